"""Whatever a client posts as the inputs of our nodes: a result or a clear error, and a server that stays up."""

import pytest
from hotpath_pack.devtools.server import PromptFailed
from hotpath_pack.devtools.workflows import sampling
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import TOLERANCE, serve

VALID = {
    "mode": st.sampled_from(["default", "max-autotune", "reduce-overhead"]),
    # Inductor works as the others do and would take a minute for each of the settings.
    "backend": st.sampled_from(["eager", "aot_eager"]),
    "fullgraph": st.booleans(),
    "dynamic": st.sampled_from(["auto", "always", "never"]),
    "double_blocks": st.sampled_from(["all", "none", "0", " ALL ", "0,0-0"]),
    "single_blocks": st.sampled_from(["all", "none", "0", "0-0,0"]),
    "on_failure": st.sampled_from(["eager", "error"]),
}
TEXTS = st.one_of(
    st.text(max_size=20),
    st.from_regex(r"[0-9alnone,\- ]{1,12}", fullmatch=True),
    st.integers(1, 20000).map(lambda count: "9" * count),
    st.integers(1, 20000).map(lambda count: "0-1," * count),
    st.sampled_from(["../../etc/passwd", "\x00", "__import__('os')", "{}", "%s%s%n"]),
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
    st.lists(st.one_of(st.integers(), st.text(max_size=5), st.sampled_from(["model", "compile"])), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)
MISSING = object()
# Before any code of ours has run.
REFUSED_BY_THE_HOST = {
    "required_input_missing",
    "value_not_in_list",
    "value_smaller_than_min",
    "value_bigger_than_max",
    "invalid_input_type",
    "bad_linked_input",
    "return_type_mismatch",
    "exception_during_inner_validation",
    "exception_during_validation",
}


@st.composite
def compile_inputs(draw):
    """Mostly valid inputs, of which some are anything or missing."""
    odd = draw(st.sets(st.sampled_from(sorted(VALID)), max_size=3))
    return {
        name: draw(st.one_of(ODD, st.just(MISSING))) if name in odd else draw(valid) for name, valid in VALID.items()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("host"), 1, 1, hidden=128) as live:
        yield live


def outcome(server, workflow):
    """None when the prompt succeeded, else the error (node, type, message)."""
    try:
        server.run(workflow, timeout=120)
    except PromptFailed as failed:
        return failed.node_id, failed.type, failed.message
    return None


def assert_clear(error, names):
    """An error that names one of the inputs and is a sentence, not something that fell out of Python."""
    if error is None:
        return
    node, kind, message = error
    assert node is not None, message
    if kind not in REFUSED_BY_THE_HOST:
        assert "Traceback" not in message and len(message) < 500, message
        assert kind in {"custom_validation_failed", "ValueError"} or kind.endswith("CompileSettingsError"), error
        assert any(name in message for name in names), message


def given_workflow(tiny, compiled, quantized=None, **inputs):
    run = dict(width=64, height=64, steps=1, tokens=4, compiled=compiled, quantized=quantized, report=True)
    workflow = sampling(tiny.checkpoint, tiny.flux, offload={}, **run)
    for node, changes in inputs.items():
        workflow[node]["inputs"].update(changes)
    for node in workflow.values():
        node["inputs"] = {name: value for name, value in node["inputs"].items() if value is not MISSING}
    return workflow


FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True)


@settings(FUZZ, max_examples=2000)
@given(inputs=compile_inputs())
def test_any_inputs_of_the_compile_node(tiny, inputs):
    assert_clear(outcome(tiny.server, given_workflow(tiny, inputs)), VALID)


@settings(FUZZ, max_examples=200)
@given(
    format=st.one_of(st.sampled_from(["int8_weight_only", "nvfp4"]), ODD, st.just(MISSING)),
    skip=st.one_of(st.sampled_from(["", "img_mlp.*", "single_blocks.0.*, *.proj", "[", "*"]), ODD, st.just(MISSING)),
)
def test_any_inputs_of_the_quantize_node(tiny, format, skip):
    inputs = {"format": format, "skip": skip}
    workflow = given_workflow(tiny, {"backend": "eager"}, "int8_weight_only", quantize=inputs)
    assert_clear(outcome(tiny.server, workflow), inputs)


@settings(FUZZ, max_examples=60)
@given(
    inputs=st.fixed_dictionaries(
        {},
        optional={
            "budget": st.one_of(st.sampled_from(["auto", "0 %", "50%", "0.01 GiB"]), ODD, st.just(MISSING)),
            "prefetch_blocks": st.one_of(st.integers(-2, 10), ODD, st.just(MISSING)),
            "pin_memory": st.one_of(st.booleans(), ODD, st.just(MISSING)),
            "modulation": st.one_of(st.sampled_from(["ahead", "in place"]), ODD, st.just(MISSING)),
            "resident": st.one_of(st.sampled_from(["spread", "first", "last"]), ODD, st.just(MISSING)),
        },
    )
)
def test_any_inputs_of_the_offload_node(tiny, inputs):
    workflow = given_workflow(tiny, {"backend": "eager"}, offload=inputs)
    assert_clear(outcome(tiny.server, workflow), inputs)


@settings(FUZZ, max_examples=300)
@given(node=st.sampled_from(["quantize", "offload", "compile", "report"]), model=ODD, after=ODD)
def test_any_value_in_place_of_a_link(tiny, node, model, after):
    changes = {"report": {"after": after}, node: {"model": model}}
    workflow = given_workflow(tiny, {"backend": "eager"}, "int8_weight_only", **changes)
    assert_clear(outcome(tiny.server, workflow), ["model", "after"])


def test_and_after_all_that_the_image_is_right(tiny):
    assert tiny.difference(compiled={"backend": "aot_eager"}, steps=2) <= TOLERANCE
