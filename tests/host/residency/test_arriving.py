"""Weights that the host left in RAM without dynamic VRAM: on the device for the length of a block, by a stream that
gives their memory to nobody before the block is done. Devices and streams are imitated; tests/gpu has real ones."""

from contextlib import nullcontext

import comfy.model_management
import comfy.ops
import pytest
import torch
from hotpath_pack.host.residency.arriving import arriving

DEVICE = torch.device("meta")


class Stream:
    """A side stream that notes what waits for what."""

    def __init__(self):
        self.events = []

    def as_context(self, stream):
        self.events.append("copies")
        return nullcontext()

    def wait_stream(self, other):
        self.events.append(f"waits for {other}")


class Compute:
    def __init__(self, side):
        self.side = side

    def wait_stream(self, other):
        assert other is self.side
        self.side.events.append("is waited for")

    def __str__(self):
        return "compute"


@pytest.fixture
def side(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(comfy.model_management, "get_offload_stream", lambda device: stream)
    monkeypatch.setattr(comfy.model_management, "current_stream", lambda device: Compute(stream))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 2**30)
    return stream


def layers():
    operations = comfy.ops.manual_cast
    with torch.inference_mode():
        away, there = operations.Linear(4, 4), operations.Linear(4, 4, bias=False)
        there.weight = torch.nn.Parameter(torch.empty(4, 4, device=DEVICE), requires_grad=False)
    return away, there


def test_weights_are_there_for_the_scope_and_their_memory_after_it(side):
    away, there = layers()
    before = {**away._parameters}, {**there._parameters}
    with arriving([away, there], DEVICE) as for_now:
        assert for_now and side.events == ["copies", "copies", "is waited for"]
        assert {parameter.device for parameter in (away.weight, away.bias)} == {DEVICE}
        assert there.weight is before[1]["weight"]
    assert side.events[-1] == "waits for compute"
    assert all(away._parameters[name] is before[0][name] for name in ("weight", "bias"))


def test_what_fails_within_leaves_them_as_they_were(side):
    away, _ = layers()
    weight = away.weight
    with pytest.raises(RuntimeError, match="within"), arriving([away], DEVICE):
        raise RuntimeError("within")
    assert away.weight is weight and side.events[-1] == "waits for compute"


@pytest.mark.parametrize("known", [True, False], ids=["known before", "not known before"])
def test_without_memory_for_them_they_stay(side, monkeypatch, known):
    away, _ = layers()
    weight, tried = away.weight, []

    def full(*args, **kwargs):
        tried.append(None)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(comfy.model_management, "cast_to", full)
    if known:
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 2**20)
    with arriving([away], DEVICE) as for_now:
        assert not for_now and away.weight is weight
    assert len(tried) == (0 if known else 1)


def test_without_a_stream_they_stay(side, monkeypatch):
    """As with the host's --disable-async-offload."""
    monkeypatch.setattr(comfy.model_management, "get_offload_stream", lambda device: None)
    away, there = layers()
    weight = away.weight
    with arriving([away, there], DEVICE) as for_now:
        assert not for_now and away.weight is weight
    with arriving([there], DEVICE) as for_now:
        assert not for_now
