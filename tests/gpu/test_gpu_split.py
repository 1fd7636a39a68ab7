"""Tokens shared out over two cards: what one card gives, eager and compiled, and one card where the other fails."""

import pytest
import torch
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.gpu_host import compiled, quantize
from hotpath_pack.hotpath.counters import graphs_so_far

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device on this machine"),
]


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def filed(request, tmp_path):
    import comfy.sd

    path = checkpoints.save(tmp_path / "flux.safetensors", checkpoints.flux1(2, 3, dtype=request.param))
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": request.param})


@torch.inference_mode()
def split(model):
    from hotpath_pack.host.splitting.split import split_repeated_blocks
    from hotpath_pack.host.telling.progress import NodeText

    return split_repeated_blocks(model, "0, 1", NodeText(None))


def blocks_of(model):
    (blocks,) = model.get_wrappers("apply_model", "hotpath_split")
    return blocks


def assert_like(model, two, **run):
    from hotpath_pack.devtools.sampling import sample

    want, got = sample(model, **run), sample(two, **run)
    exact = model.model.get_dtype_inference() == torch.float32
    assert want.isfinite().all() and want.std() > 0.1
    assert (want - got).norm() / want.norm() <= (1e-4 if exact else 0.03)
    assert (blocks_of(two).why_not, blocks_of(two).steps) == ("", run.get("steps", 2))


def test_two_cards_give_the_image_of_one(filed):
    two = split(filed)
    for change in (dict(), dict(width=272, height=144, tokens=33), dict(batch=2)):
        assert_like(filed, two, **change)


def test_compiled_it_is_two_graphs_a_card_whatever_the_size(filed):
    fast, before = compiled(split(filed)), graphs_so_far()
    for change in (dict(), dict(width=272, height=144), dict(tokens=33), dict(steps=4)):
        assert_like(filed, fast, **change)
    assert graphs_so_far() - before == 4


def test_in_eight_bits(filed):
    small = quantize(filed, "int8_weight_only")
    assert_like(small, compiled(split(small)))


def test_a_card_without_memory_ends_in_the_image_of_one(filed):
    from hotpath_pack.devtools.sampling import sample

    two = split(filed)
    want = sample(filed)
    (copy,) = two.get_additional_models_with_key("hotpath_split")

    def without_memory(*args, **kwargs):
        return torch.empty(2**50, device="cuda:1")

    copy.model.diffusion_model.final_layer.forward = without_memory
    try:
        assert torch.equal(want, sample(two))
    finally:
        del copy.model.diffusion_model.final_layer.forward
    assert blocks_of(two).why_not.startswith("cuda:1 failed: CUDA out of memory")
    assert_like(filed, two)
