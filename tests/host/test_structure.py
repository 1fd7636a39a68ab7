"""What is said, at start and on the node, of a ComfyUI whose blocks are built in a way that this pack does not know."""

import comfy.ldm.flux.layers
import pytest
from comfyui_version import __version__
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host import structure
from sampling import Texts, assert_parity, compiled, load


@pytest.fixture(autouse=True)
def asked_anew():
    structure.unknown_structure.cache_clear()
    yield
    structure.unknown_structure.cache_clear()


def test_nothing_of_one_that_it_knows(caplog):
    structure.tell_unknown_structure()
    assert structure.unknown_structure() == caplog.text == ""


def test_which_it_was_tested_with_and_that_images_are_right(newer, monkeypatch, caplog):
    kind = comfy.ldm.flux.layers.SingleStreamBlock
    make = kind.__init__

    def with_more(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.more = newer.Counts()

    monkeypatch.setattr(kind, "__init__", with_more)
    structure.tell_unknown_structure()
    said = structure.unknown_structure()
    assert said.startswith(
        f"single blocks of this ComfyUI {__version__} can't be compiled (comfy.ldm.newer.Counts changes "
    )
    assert "images are right and not faster. HotPath was tested with ComfyUI 0.24.0 to " in said
    assert said in caplog.text
    model, text = load(checkpoints.flux1(1, 1)), Texts()
    assert_parity(model, compiled(model, backend="eager", text=text))
    assert said in text.seen[-1] and (said, "") in text.last["reasons"]


def test_a_block_that_is_made_otherwise(monkeypatch):
    monkeypatch.setattr(comfy.ldm.flux.layers.DoubleStreamBlock, "__init__", lambda self, config: None)
    assert "unexpected keyword argument 'hidden_size'" in structure.unknown_structure()
