"""When something can't be compiled: the right image or a clear error, and the next prompt can try again."""

import comfy.model_management
import pytest
import torch
from hotpath_pack.hotpath.compiled import RegionFailed
from sampling import Counting, Texts, assert_parity, compiled, compiled_blocks, sample
from torch._dynamo import register_backend


class Faulty:
    """A backend that fails as long as it is told to."""

    def __init__(self):
        self.error = None
        self.calls = 0

    def __call__(self, graph, inputs):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return graph.forward


FAULTY = Faulty()
register_backend(name="hotpath_faulty")(lambda graph, inputs, **kwargs: FAULTY(graph, inputs))

FAULTS = [RuntimeError("no such kernel"), torch.OutOfMemoryError("CUDA out of memory while autotuning")]


@pytest.fixture
def faulty():
    FAULTY.error, FAULTY.calls = None, 0
    yield FAULTY
    FAULTY.error = None


@pytest.mark.parametrize("error", FAULTS, ids=["backend", "out-of-memory"])
def test_the_prompt_goes_on_eager_and_says_why(flux, faulty, caplog, error):
    faulty.error = error
    text = Texts()
    fast = compiled(flux, backend="hotpath_faulty", on_failure="eager", text=text)
    assert_parity(flux, fast)
    assert faulty.calls == 2, "one attempt a region"
    assert dict(compiled_blocks(fast).compiled) == {}
    for kind in ("double", "single"):
        assert f"the {kind} block region could not be compiled: " in text.seen[-1]
    assert str(error) in text.seen[-1]
    assert str(error) in caplog.text


@pytest.mark.parametrize("error", FAULTS, ids=["backend", "out-of-memory"])
def test_or_it_ends_with_the_reason(flux, faulty, error):
    faulty.error = error
    with pytest.raises(RegionFailed, match="the double block region could not be compiled: .*" + str(error)):
        sample(compiled(flux, backend="hotpath_faulty", on_failure="error"))
    assert_parity(flux, compiled(flux))


def test_without_fullgraph_it_goes_on_too_with_its_inputs_as_they_were(flux, faulty):
    """A part may have run by then, and blocks update their inputs in place."""
    faulty.error = RuntimeError("no such kernel")
    fast = compiled(flux, backend="hotpath_faulty", on_failure="eager", fullgraph=False)
    assert_parity(flux, fast)
    assert "no such kernel" in compiled_blocks(fast).summary() and compiled_blocks(fast).compiled == {}


def test_the_next_prompt_can_compile_again(flux, faulty):
    fast = compiled(flux, backend="hotpath_faulty", on_failure="eager")
    faulty.error = RuntimeError("not now")
    assert_parity(flux, fast)
    faulty.error = None
    assert_parity(flux, fast)
    assert dict(compiled_blocks(fast).compiled) == {"double": 2, "single": 3}
    assert compiled_blocks(fast).eager == {}


def test_an_interrupt_while_compiling_ends_the_prompt_and_nothing_else(flux, faulty):
    def interrupt(graph, inputs):
        comfy.model_management.interrupt_current_processing()
        return graph.forward

    register_backend(name="hotpath_interrupting")(lambda graph, inputs, **kwargs: interrupt(graph, inputs))
    fast = compiled(flux, backend="hotpath_interrupting", on_failure="eager")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(fast)
    comfy.model_management.interrupt_current_processing(False)
    assert not [block for block in flux.model.diffusion_model.modules() if "forward" in block.__dict__]
    assert_parity(flux, compiled(flux))


def test_a_missing_compiler_is_named_before_anything_is_tried(flux):
    text = Texts()
    fast = compiled(flux, backend="inductor", on_failure="eager", text=text)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), Counting() as counting:
        assert_parity(flux, fast)
    assert counting.graphs == 0
    assert "no C++ compiler was found" in text.seen[-1] and "set CXX" in text.seen[-1]
    assert not any("compiling" in shown for shown in text.seen)
    with pytest.raises(RegionFailed, match="no C\\+\\+ compiler was found"):
        with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
            sample(compiled(flux, backend="inductor", on_failure="error"))


def test_the_node_shows_its_text_again_in_each_run(flux):
    text = Texts()
    fast = compiled(flux, text=text)
    sample(fast)
    (*_, last) = text.seen
    text.seen.clear()
    sample(fast)
    assert text.seen == [last]
    assert text.last["state"] == "compiled"
    facts = text.last["facts"]
    assert (facts["blocks"], facts["graphs"]) == ("2 double, 3 single", 2) and facts["step_seconds"] > 0
