"""Benchmark Model and Warm Up over HTTP."""

import re

import pytest
import torch
from hotpath_pack.devtools.server import PromptFailed
from hotpath_pack.devtools.workflows import COMPILE_DEFAULTS

SIZE = {"width": 64, "height": 48, "batch_size": 1, "text_tokens": 16, "steps": 2, "rounds": 1}


def line(live, **nodes):
    """A workflow of a loader, Compile Repeated Blocks and ``nodes`` (class, inputs)."""
    compiled = {**COMPILE_DEFAULTS, "backend": "eager", "cache": "off", "model": ["model", 0]}
    return {
        "model": {"class_type": "UNETLoader", "inputs": {"unet_name": live.checkpoint, "weight_dtype": "default"}},
        "compile": {"class_type": "HotPathCompileRepeatedBlocks", "inputs": compiled},
        **{name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()},
    }


def benchmark(live, **inputs):
    given = {"model": ["compile", 0], "compare_with": ["model", 0], **SIZE, **inputs}
    return line(live, benchmark=("HotPathBenchmarkModel", given))


def warm_up(live, **inputs):
    given = {"model": ["compile", 0], "sizes": "64x48", "batch_sizes": "1", "text_tokens": 16, **inputs}
    return line(live, warm=("HotPathWarmUp", given))


def test_both_sides_are_told_and_drawn_with_progress_and_the_model_stays_as_it_is(small_flux):
    before = small_flux.latent(seed=5)
    result = small_flux.server.run(benchmark(small_flux))
    shown = result.history["outputs"]["benchmark"]
    (text,) = shown["text"]
    lines = text.splitlines()
    assert lines[0].startswith("Flux, 64x48, batch 1, 16 text tokens, 2 steps, ")
    assert re.match(r"compiled: .* a step \(.* to .*\), .* for 2 steps, .* once, .* of compiling", lines[1])
    assert lines[2].startswith("eager: ") and " times as fast as " in lines[3]
    assert [image["filename"].endswith(".png") for image in shown["images"]] == [True]
    progress = [(event.data["value"], event.data["max"]) for event in result.events if event.type == "progress"]
    assert progress == sorted(progress) and progress[-1] == (8, 8), "each step of two runs of two sides"
    states = [
        event.data["state"]
        for event in result.events
        if event.data.get("node") == "benchmark" and "state" in event.data
    ]
    assert states == ["working"] * 4 + ["done"]
    small_flux.server.free()
    assert torch.equal(small_flux.latent(seed=5), before)


def test_what_was_warmed_up_is_ready(small_flux):
    result = small_flux.server.run(warm_up(small_flux, sizes="64x48, 80x64", batch_sizes="1, 2"))
    (text,) = result.history["outputs"]["warm"]["text"]
    assert [entry.split(", 16")[0] for entry in text.splitlines()] == [
        f"{size}, batch {batch}" for batch in (1, 2) for size in ("64x48", "80x64")
    ]
    assert result.texts[-1] == ("warm", "ready for 4 kinds of input")
    before = small_flux.counts()
    for batch in (1, 2):
        small_flux.sample(compiled={"backend": "eager", "cache": "off"}, width=96, height=64, batch=batch)
    assert small_flux.counts() == before


@pytest.mark.parametrize(
    "make, inputs, says",
    [
        (warm_up, {"sizes": "wide"}, "sizes: cannot read 'wide'"),
        (warm_up, {"batch_sizes": "0"}, "batch_sizes: cannot read '0'"),
        (warm_up, {"model": ["model", 0]}, "model: nothing compiles it"),
        (warm_up, {"model": "flux"}, "model"),
        (benchmark, {"steps": 1}, "steps"),
        (benchmark, {"model": "flux"}, "model: this is str, not a MODEL"),
        (benchmark, {"compare_with": 3}, "model: this is int, not a MODEL"),
    ],
)
def test_bad_inputs_are_named(small_flux, make, inputs, says):
    with pytest.raises(PromptFailed) as failed:
        small_flux.server.run(make(small_flux, **inputs))
    assert says in str(failed.value)
