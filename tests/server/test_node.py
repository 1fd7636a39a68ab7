"""The node as a user of the host's API meets it."""

import pytest
import requests
from hotpath_pack.devtools.server import PromptFailed
from hotpath_pack.devtools.workflows import sampling
from live import TOLERANCE

EAGER = {"backend": "aot_eager"}


@pytest.fixture(scope="module")
def schema(small_flux):
    return small_flux.server.get("/object_info/HotPathCompileRepeatedBlocks")["HotPathCompileRepeatedBlocks"]


def test_the_node_is_described(schema):
    assert schema["display_name"] == "Compile Repeated Blocks"
    assert schema["category"].startswith("model/patch/")
    assert schema["output"] == ["MODEL"]
    assert "compiles one double-stream and one single-stream block" in schema["description"]
    inputs = schema["input"]["required"]
    assert list(inputs) == [
        "model",
        "mode",
        "backend",
        "fullgraph",
        "dynamic",
        "double_blocks",
        "single_blocks",
        "on_failure",
    ]
    assert list(schema["input"]["optional"]) == ["cache", "cuda_graphs", "when", "blocks"], (
        "an older API workflow still runs"
    )
    assert all(options["tooltip"] for _, options in {**inputs, **schema["input"]["optional"]}.values())
    assert inputs["backend"][1]["options"][0] == "inductor"
    assert inputs["fullgraph"][1]["default"] is True


def test_the_help_page_is_served(small_flux):
    page = requests.get(f"{small_flux.server.url}/extensions/HotPath/docs/HotPathCompileRepeatedBlocks.md", timeout=10)
    assert page.status_code == 200
    assert page.text.startswith("# Compile Repeated Blocks")


def test_the_node_shows_what_it_compiles_and_what_it_took(small_flux):
    result = small_flux.sample(compiled={"backend": "aot_eager", "dynamic": "always"}, steps=2)
    texts = [text for node, text in result.texts if node == "compile"]
    assert texts[:2] == ["compiling double block region (1/2) ...", "compiling single block region (2/2) ..."]
    assert texts[2].startswith("2 double and 3 single blocks run as 2 regions, compiled in ")
    assert len(texts) == 3


PATCHES = [
    "attn1_patch",
    "attn1_output_patch",
    "patches_replace",
    "attention_override",
    "forward_hook",
    "inner_forward",
    "foreign_linear",
]


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.sweep(keep=["attn1_patch", "attention_override", "inner_forward"])
def test_patches_of_other_nodes_added_changed_and_removed(small_flux, kind):
    plain = small_flux.latent(steps=2)
    assert small_flux.difference(compiled=EAGER, steps=2) <= TOLERANCE
    for strength in (1.5, 0.5):
        options = dict(steps=2, patches=[(kind, strength)])
        assert (small_flux.latent(**options) - plain).abs().max() > 1e-3, "the patch does nothing"
        assert small_flux.difference(compiled=EAGER, **options) <= TOLERANCE
    assert small_flux.difference(compiled=EAGER, steps=2) <= TOLERANCE


@pytest.mark.parametrize("kind", ["forward_hook", "inner_forward", "foreign_linear"])
def test_what_is_not_hoisted_is_told(small_flux, kind):
    result = small_flux.sample(compiled=EAGER, steps=1, seed=99, patches=[(kind, 1.25)])
    reason = {
        "forward_hook": "has a forward hook",
        "inner_forward": "has an overridden forward",
        "foreign_linear": "ForeignLinear is not a layer that HotPath knows",
    }[kind]
    assert any(reason in text for node, text in result.texts if node == "compile")
    assert reason in small_flux.server.log_text()


@pytest.mark.parametrize(
    "inputs, says",
    [
        ({"double_blocks": "0-5"}, "double_blocks: block 5 is outside this model, which has 2 (0-1)"),
        ({"double_blocks": "none", "single_blocks": "none"}, "leave no block of this model to compile"),
        ({"mode": "max-autotune", "backend": "aot_eager"}, "is a setting of the inductor backend"),
        ({"single_blocks": "x" * 10_000}, f"cannot read '{'x' * 40}'. Use"),
        ({"single_blocks": "two"}, "single_blocks: cannot read 'two'"),
        ({"single_blocks": "3-1"}, "the range '3-1' runs backwards. Write '1-3'"),
        ({"mode": "fastest"}, "fastest"),
        ({"backend": "cudagraphs"}, "cudagraphs"),
    ],
)
def test_bad_input_is_named_and_the_model_stays_usable(small_flux, inputs, says):
    with pytest.raises(PromptFailed) as failed:
        small_flux.sample(compiled=inputs, steps=1)
    assert failed.value.node_id == "compile"
    assert says in failed.value.message
    assert small_flux.difference(compiled=EAGER, steps=1) <= TOLERANCE


def test_a_linked_block_range_is_read_when_the_node_runs(small_flux):
    def sample(text):
        workflow = sampling(small_flux.checkpoint, small_flux.flux, steps=1, compiled=EAGER)
        workflow["range"] = {"class_type": "PrimitiveString", "inputs": {"value": text}}
        workflow["compile"]["inputs"]["double_blocks"] = ["range", 0]
        return small_flux.server.run(workflow)

    sample("1")
    (model,) = small_flux.server.report()["models"]
    assert model["compiled_blocks"] == {"double": 1, "single": 3}
    with pytest.raises(PromptFailed, match="double_blocks: cannot read 'one'"):
        sample("one")


def test_two_compile_nodes_on_one_model_keep_their_settings(small_flux):
    for compiled in ({**EAGER, "double_blocks": "none"}, {**EAGER, "single_blocks": "0,2"}):
        assert small_flux.difference(compiled=compiled, steps=2) <= TOLERANCE
        (model,) = small_flux.server.report()["models"]
        assert model["compiled_blocks"] == (
            {"single": 3} if "double_blocks" in compiled else {"double": 2, "single": 2}
        )


def test_the_report_changes_nothing(small_flux):
    for method in ("post", "put", "delete", "patch"):
        answer = requests.request(method, f"{small_flux.server.url}/hotpath/report", timeout=10)
        assert answer.status_code == 405
