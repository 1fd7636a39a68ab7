"""Benchmark Model and Warm Up: the MODEL is run as in a prompt, and nothing of it is changed."""

import comfy.model_management
import pytest
import torch
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.compiling import warm_up as host_warm_up
from hotpath_pack.host.measuring.benchmark import Side, benchmark_model, break_even, describe
from hotpath_pack.host.measuring.synthetic import Inputs, read_batch_sizes, read_sizes
from hotpath_pack.host.measuring.synthetic import sample as run
from hotpath_pack.host.residency.offload import KEY, OffloadSettings, offload_repeated_blocks
from hotpath_pack.host.residency.streaming import StreamedBlocks
from sampling import Counting, Texts, compiled, load, sample

SMALL = Inputs(64, 48, 1, 16)


@pytest.mark.parametrize("make", [lambda: checkpoints.flux1(1, 1), lambda: checkpoints.flux2(1, 1)])
def test_each_step_of_each_model_is_timed_at_the_size_that_was_asked_for(make):
    model = load(make())
    seen = []

    def look(executor, x, *args, **kwargs):
        seen.append(x.shape[0])
        return executor(x, *args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key("apply_model", "look", look)
    seconds = run(watched, Inputs(64, 48, 2, 7), 3)
    assert len(seconds) == 3 and all(second > 0 for second in seconds)
    assert seen == [2, 2, 2], "what is on the MODEL acts"


def test_the_model_stays_as_it_is(flux):
    before = sample(flux)
    options, wrappers = repr(flux.model_options), repr(flux.wrappers)
    run(flux, SMALL, 2)
    assert repr(flux.model_options) == options and repr(flux.wrappers) == wrappers
    assert torch.equal(sample(flux), before)


def test_an_interrupt_ends_it_between_steps(flux):
    done = []

    def interrupt():
        done.append(1)
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(flux, SMALL, 5, interrupt)
    assert len(done) == 1


def test_what_was_warmed_up_compiles_nothing_again(flux):
    fast, text = compiled(flux, backend="eager"), Texts()
    with Counting() as warming:
        told = host_warm_up.warm_up(fast, "64x64, 48x80", "1, 2", 16, text)
    assert warming.graphs > 0
    assert [line.split(", 16")[0] for line in told.splitlines()] == [
        f"{size}, batch {batch}" for batch in (1, 2) for size in ("64x64", "48x80")
    ]
    assert text.seen[0] == "warming up 64x64, batch 1, 16 text tokens (1/4) ..."
    assert text.seen[-1] == "ready for 4 kinds of input"
    with Counting() as after:
        for size in ((64, 64), (48, 80)):
            sample(fast, *size, batch=2)
            sample(fast, *size)
    assert after.graphs == 0


def test_a_model_that_nothing_compiles_is_not_warmed_up(flux):
    with pytest.raises(ValueError, match=r"model: nothing compiles it.*after Compile Repeated Blocks"):
        host_warm_up.warm_up(flux, "64x64", "1", 16, Texts())


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "sizes: it is empty. Write at least one, such as 1024x1024"),
        ("1024", "sizes: cannot read '1024'. Write width x height"),
        ("1024x1024, wide", "sizes: cannot read 'wide'"),
        ("1000x1024", "sizes: 1000 in '1000x1024' is no multiple of 16 from 16 to 16384. The nearest is 992"),
        ("1024x0", "The nearest is 16"),
        ("99999x16", "The nearest is 16384"),
        ("9" * 1000, f"cannot read '{'9' * 40}'."),
    ],
)
def test_a_bad_size_is_named(text, says):
    with pytest.raises(ValueError) as refused:
        read_sizes(text)
    assert says in str(refused.value)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "two", "5000"])
def test_a_bad_batch_size_is_named(text):
    with pytest.raises(ValueError, match="^batch_sizes: "):
        read_batch_sizes(text)


def test_sizes_are_read_once_each():
    assert read_sizes(" 1024x1024, 832 X 1216,1024x1024,") == [(1024, 1024), (832, 1216)]
    assert read_batch_sizes("2, 1,2") == [2, 1]


def test_both_sides_run_in_turns_and_are_drawn(flux):
    order = []

    def named(name, model):
        def note(executor, *args, **kwargs):
            order.append(name)
            return executor(*args, **kwargs)

        side = model.clone()
        side.add_wrapper_with_key("apply_model", "note", note)
        return side

    text = Texts()
    told, image = benchmark_model(named("a", compiled(flux)), named("b", flux), SMALL, 2, 3, text)
    assert order == ["a", "a", "b", "b"] * 4, "one run to compile and three rounds"
    lines = told.splitlines()
    assert lines[0] == "Flux, 64x48, batch 1, 16 text tokens, 2 steps, cpu"
    assert lines[1].startswith("compiled: ") and " of compiling" in lines[1]
    assert lines[2].startswith("eager: ") and "compiling" not in lines[2]
    assert "times as fast as" in lines[3] and text.seen[-1] == lines[3]
    assert text.seen[0] == "compiled: first run ..."
    assert image.shape == (1, 800, 1600, 3) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    for colour in ((0x42, 0x69, 0xD0), (0xEF, 0xB1, 0x18)):
        near = (image[0] * 255 - torch.tensor(colour)).abs().amax(-1) < 3
        assert near.sum() > 500, "each side has its colour in the figure"


def test_sides_are_called_what_sets_them_apart(flux):
    lean = offload_repeated_blocks(flux, OffloadSettings(budget="40 %"), Texts())
    told, _ = benchmark_model(compiled(lean), lean, SMALL, 2, 1, Texts())
    lines = told.splitlines()
    assert lines[1].startswith("offloaded + compiled: ") and lines[2].startswith("offloaded + eager: ")
    (streamed,) = [each for each in lean.get_wrappers("apply_model", KEY) if isinstance(each, StreamedBlocks)]
    assert streamed.bytes_copied > 0
    assert lines[2].endswith(f"{streamed.bytes_copied / 2 / 2**20:.1f} MiB streamed a step")
    told, _ = benchmark_model(flux, flux, SMALL, 2, 1, Texts())
    assert [line.split(": ")[0] for line in told.splitlines()[1:3]] == ["eager (model)", "eager (compare_with)"]


def test_a_compiled_step_is_shown_beside_an_eager_one_that_was_measured(flux):
    text = Texts()
    fast = compiled(flux, text=text)
    run(fast, SMALL, 3)
    assert "step_seconds" in text.last["facts"] and "gain" not in text.last["facts"]
    benchmark_model(fast, flux, SMALL, 3, 1, Texts())
    run(fast, SMALL, 3)
    facts = text.last["facts"]
    assert facts["gain"] >= facts["eager_step_seconds"] / facts["step_seconds"] > 0, "the quickest of both are compared"
    run(fast, Inputs(48, 48, 1, 16), 3)
    assert "gain" not in text.last["facts"], "nothing was measured at that size"
    patched = flux.clone()
    patched.add_patches({"diffusion_model.final_layer.linear.bias": (torch.ones(64),)})
    run(compiled(patched, text=text), SMALL, 3)
    assert "gain" not in text.last["facts"], "nor with that patch"


def test_a_model_that_fails_is_told_on_the_node(flux):
    def fail(executor, *args, **kwargs):
        raise RuntimeError("out of luck")

    broken, text = flux.clone(), Texts()
    broken.add_wrapper_with_key("apply_model", "fail", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        benchmark_model(broken, None, SMALL, 2, 1, text)
    assert text.seen[-1] == "stopped: out of luck" and text.last["state"] == "stopped"


def test_one_model_alone_is_drawn_too(flux):
    told, image = benchmark_model(flux, None, SMALL, 2, 1, Texts())
    assert len(told.splitlines()) == 2 and image.std() > 0.01


def test_break_even_is_what_is_paid_once_over_what_an_image_gains():
    fast = Side("compiled", first=21.0, compiling=18.0, steps=[1.0, 1.1, 0.9], images=[8.0], peak=3 * 2**30)
    slow = Side("eager", first=2.5, steps=[1.5], images=[12.0])
    assert (fast.once, slow.once) == (20.0, 1.0)
    assert break_even(fast, slow, batch=1) == 5, "19 s at 4 s an image"
    assert break_even(fast, slow, batch=2) == 10, "a run of two images gains 2 s each"
    assert break_even(fast, fast, batch=1) is None
    lines = describe([fast, slow], 1, 8, "this machine").splitlines()
    assert lines[1] == (
        "compiled: 1.00 s a step (900 ms to 1.10 s), 8.00 s for 8 steps, 20.00 s once, 18.00 s of compiling, "
        "peak memory 3.00 GiB"
    )
    assert lines[3] == "compiled is 1.50 times as fast as eager, ahead from image 5 on"
    assert Side("compiled", first=1.0, compiling=18.0, steps=[1.0]).once == 18.0, "it was compiled before"
