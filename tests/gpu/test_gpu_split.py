"""Tokens shared out over two cards: what one card gives, eager and compiled, and one card where the other fails. On a
machine with one card that is both, with a model and a thread each."""

import pytest
import torch
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.gpu_host import compiled, quantize
from hotpath_pack.devtools.reruns import forwards_in_fibers, of_each_device
from hotpath_pack.hotpath import fibers
from hotpath_pack.hotpath.counters import graphs_so_far

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["one card as two", "two cards"])
def devices(request, monkeypatch):
    """The second of two devices."""
    import comfy.model_management
    import comfy.model_patcher
    from hotpath_pack.host.compiling import replay

    if request.param == "two cards":
        if torch.cuda.device_count() < 2:
            pytest.skip("no second CUDA device on this machine")
        return torch.device("cuda", 1)
    card = torch.device("cuda", 0)
    # Another name of the card, which is a device of its own to all but dynamic VRAM and recordings.
    twin = torch.device("cuda")
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: [card, twin])
    monkeypatch.setattr(comfy.model_management, "set_torch_device", lambda device: None)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    recordings = [replay.Recordings(replay.recorder_for(card), lambda size: True) for _ in range(2)]
    monkeypatch.setattr(replay, "recordings_on", of_each_device(recordings))
    return twin


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def filed(request, tmp_path, devices):
    import comfy.sd

    # Another width is another structure: no graph of one card as two is known to two.
    weights = checkpoints.flux1(2, 3, hidden=512 if devices.index else 256, dtype=request.param)
    path = checkpoints.save(tmp_path / "flux.safetensors", weights)
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


def test_compiled_it_is_two_graphs_a_card_whatever_the_size(filed, devices):
    fast, before = compiled(split(filed)), graphs_so_far()
    for change in (dict(), dict(width=272, height=144), dict(tokens=33), dict(steps=4)):
        assert_like(filed, fast, **change)
    assert graphs_so_far() - before == (4 if devices.index else 2)


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)], ids=["cuDNN", "FlashAttention"])
def test_parts_of_attention_weigh_as_all_of_it(monkeypatch, capability):
    from hotpath_pack.hotpath import partial_attention

    if torch.cuda.get_device_capability() < capability:
        pytest.skip("the card is older")
    monkeypatch.setattr(partial_attention, "prefers_cudnn", lambda like: capability == (9, 0))
    q, k, v = torch.randn(3, 1, 2, 300, 128, device="cuda", dtype=torch.bfloat16)
    parts = [partial_attention._part(q, k[:, :, part], v[:, :, part]) for part in (slice(100), slice(100, None))]
    want = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    got = partial_attention._weighed(*parts)
    assert (want - got).norm() / want.norm() <= 0.01


def test_in_eight_bits(filed):
    small = quantize(filed, "int8_weight_only")
    assert_like(small, compiled(split(small)))


def test_replayed_blocks_are_what_one_card_gives(filed, monkeypatch):
    """From one thread where the package greenlet is there, from two where not."""
    ran = forwards_in_fibers(monkeypatch)
    fast = compiled(split(filed))
    (blocks,) = fast.get_wrappers("apply_model", "hotpath_compile")
    blocks.replays.always = True
    for change in (dict(steps=4), dict(width=272, height=144, steps=4), dict(batch=2, steps=4), dict(steps=2)):
        assert_like(filed, fast, **change)
    assert blocks.replays.replayed == {"double": 2, "single": 3} and not blocks.replays.why_not
    assert ran[-1] == fibers.available()


def test_a_card_without_memory_ends_in_the_image_of_one(filed, devices):
    from hotpath_pack.devtools.sampling import sample

    two = split(filed)
    want = sample(filed)
    (copy,) = two.get_additional_models_with_key("hotpath_split")

    def without_memory(*args, **kwargs):
        return torch.empty(2**50, device=devices)

    copy.model.diffusion_model.final_layer.forward = without_memory
    try:
        assert torch.equal(want, sample(two))
    finally:
        del copy.model.diffusion_model.final_layer.forward
    assert blocks_of(two).why_not.startswith(f"{devices} failed: ") and "out of memory" in blocks_of(two).why_not
    assert_like(filed, two)
