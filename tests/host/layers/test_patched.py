"""LoRAs on quantized weights with dynamic VRAM, whose memory is imitated here; ``tests/gpu`` runs them on a card."""

import comfy.model_management
import pytest
import torch
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.layers.quantized import format_in_use, refuse_arriving
from hotpath_pack.host.residency.weights import layer_states
from hotpath_pack.hotpath.template import NotHoistable
from sampling import load

ARRIVES = "a LoRA is added to its quantized weights in this step"


class Memory:
    """The pages of a MODEL as comfy-aimdo has them: what lies below the watermark is kept."""

    def __init__(self):
        self.pages = self.watermark = 4
        self.content, self.pinned = b"new", 0

    def get_nr_pages(self):
        return self.pages

    def get_watermark(self):
        return self.watermark

    def fault(self, page, size):
        if page >= self.watermark:
            return None
        self.pinned += 1
        return self.content

    def unpin(self, page, size):
        self.pinned -= 1


@pytest.fixture
def layer(flux_weights, monkeypatch):
    """A quantized one that multiplies by its dequantized weight, to which a LoRA is added as it arrives."""
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: False)
    with torch.inference_mode():
        model = load(checkpoints.quantized(flux_weights, "float8_e4m3fn"), dtype=torch.float32)
    layer = model.model.diffusion_model.single_blocks[0].linear1
    assert format_in_use(layer) == "float8_e4m3fn weights"
    layer.weight_lowvram_function = lambda weight: weight
    layer._v, layer._v_signature = (Memory(), 2, 1), None
    return layer


def test_it_is_as_without_the_lora_from_the_step_after_it_arrived(layer):
    memory, state = layer._v[0], layer_states(type(layer))(layer)
    assert state == "float8_e4m3fn weights"
    with pytest.raises(NotHoistable, match=ARRIVES):
        refuse_arriving(layer, state)
    layer._v_signature = memory.content
    refuse_arriving(layer, state)
    memory.content = b"old"
    with pytest.raises(NotHoistable, match=ARRIVES):
        refuse_arriving(layer, state)
    assert memory.pinned == 0
    layer._prefetch = {"resident": True}
    refuse_arriving(layer, state)
    layer._prefetch = {"resident": False}
    with pytest.raises(NotHoistable, match=ARRIVES):
        refuse_arriving(layer, state)


def test_where_not_all_of_the_model_stays_it_is_added_each_time(layer):
    memory = layer._v[0]
    layer._v_signature = memory.content
    memory.watermark = 3
    assert format_in_use(layer) is None, "whether this very page stays"
    refuse_arriving(layer, layer_states(type(layer))(layer))
    memory.watermark = 4
    assert format_in_use(layer) is None, "and in the next prompt, which begins with all"


def test_memory_that_ended_since_the_step_began(layer):
    memory, state = layer._v[0], layer_states(type(layer))(layer)
    layer._v_signature = memory.content
    memory.watermark = 2
    with pytest.raises(NotHoistable, match=ARRIVES):
        refuse_arriving(layer, state)


def test_without_a_lora_nothing_is_asked(layer):
    layer.weight_lowvram_function = None
    del layer._v
    refuse_arriving(layer, layer_states(type(layer))(layer))
