"""Weights that the host left in RAM without dynamic VRAM: on the device for the length of a block, in memory that the
host was had to leave free. Devices and what copies are imitated; tests/gpu has real ones."""

import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from hotpath_pack.host.residency import arriving
from hotpath_pack.host.residency.arriving import Arrivals
from hotpath_pack.hotpath.stream import ALIGNMENT

DEVICE = torch.device("meta")


class Engine:
    """Notes what waits for what."""

    def __init__(self):
        self.events = []

    def copy(self, sources, targets, after):
        assert all(source.nbytes == target.nbytes for source, target in zip(sources, targets, strict=True))
        self.events.append(f"{len(sources)} after {after}")
        return len(self.events)

    def wait(self, arrival):
        assert arrival == len(self.events)

    def mark(self):
        return f"use {len(self.events)}"


class Patcher:
    """The host's, of a MODEL on a card without dynamic VRAM; ``unloads`` are weights that it then leaves in RAM."""

    load_device, offload_device = DEVICE, torch.device("cpu")

    def __init__(self, dynamic=False):
        self.dynamic, self.asked, self.unloads, self.pinned = dynamic, [], [], []

    def is_dynamic(self):
        return self.dynamic

    @property
    def model(self):
        return self

    def named_parameters(self):
        return [("there", weight(DEVICE)), ("away", weight())]

    def pin_weight_to_device(self, key):
        self.pinned.append(key)

    def partially_unload(self, device, size):
        self.asked.append(size)
        if self.unloads:
            layer, weight = self.unloads.pop(0)
            layer.weight = weight


@pytest.fixture
def engine(monkeypatch):
    made = Engine()
    monkeypatch.setattr(arriving, "copy_engine", lambda device: made)
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    return made


def weight(device="cpu"):
    return torch.nn.Parameter(torch.empty(4, 4, device=device), requires_grad=False)


def layers():
    operations = comfy.ops.manual_cast
    with torch.inference_mode():
        away, there = operations.Linear(4, 4), operations.Linear(4, 4, bias=False)
        there.weight = weight(DEVICE)
    return away, there


def test_weights_are_there_for_the_scope_and_their_memory_after_it(engine):
    away, there = layers()
    before = {**away._parameters}, {**there._parameters}
    arrivals = Arrivals()
    arrivals.start(Patcher(), lambda: [[away], [there]])
    for turn in range(4):
        with arrivals.arriving([away, there], DEVICE) as for_now:
            assert for_now and {parameter.device for parameter in (away.weight, away.bias)} == {DEVICE}
            assert type(away.weight) is torch.nn.Parameter and away.weight.shape == (4, 4)
            assert there.weight is before[1]["weight"]
        assert all(away._parameters[name] is before[0][name] for name in ("weight", "bias"))
        # A place is written once the compute is done that read it last, which is two blocks before.
        assert engine.events[-1] == f"2 after use {max(0, turn - 1)}"


def test_what_fails_within_leaves_them_as_they_were(engine):
    away, _ = layers()
    arrivals, before = Arrivals(), away.weight
    arrivals.start(Patcher(), lambda: [[away]])
    with pytest.raises(RuntimeError, match="within"), arrivals.arriving([away], DEVICE):
        raise RuntimeError("within")
    assert away.weight is before


def test_the_host_leaves_memory_for_two_blocks_once(engine):
    away, there = layers()
    patcher, arrivals = Patcher(), Arrivals()
    patcher.unloads = [(there, weight())]
    arrivals.start(patcher, lambda: [[away], [there]])
    assert patcher.asked == [2 * 2 * ALIGNMENT]
    with arrivals.arriving([there], DEVICE) as for_now:
        assert for_now and there.weight.device == DEVICE
    arrivals.start(patcher, lambda: [[away], [there]])
    assert len(patcher.asked) == 1, "in the next run it is there"
    arrivals.start(patcher, lambda: [[away, comfy.ops.manual_cast.Linear(4, 4)]])
    assert patcher.asked[1:] == [2 * 2 * ALIGNMENT], "what it has it keeps"
    assert set(patcher.pinned) == {"away"}
    arrivals.drop(DEVICE)
    with arrivals.arriving([away], DEVICE) as for_now:
        assert not for_now


def test_what_leaves_for_two_blocks_is_counted_too(engine):
    """Else the places would take memory that the host counts on, and in each later run it would keep less there."""
    away, there = layers()
    patcher, arrivals = Patcher(), Arrivals()
    patcher.unloads = [(there, weight())]
    arrivals.start(patcher, lambda: [[away, there]])
    assert patcher.asked == [2 * 2 * ALIGNMENT, 2 * ALIGNMENT]
    with arrivals.arriving([away, there], DEVICE):
        assert {away.weight.device, away.bias.device, there.weight.device} == {DEVICE}


def test_what_does_not_fit_stays(engine):
    away, _ = layers()
    arrivals = Arrivals()
    arrivals.start(Patcher(), lambda: [[away]])
    more = comfy.ops.manual_cast.Linear(4, 4)
    weights = away.weight, more.weight
    with arrivals.arriving([away, more], DEVICE) as for_now:
        assert for_now and away.weight is not weights[0] and more.weight is weights[1]
    assert engine.events == ["2 after use 0"]


@pytest.mark.parametrize("why", ["dynamic VRAM", "Offload", "no streams", "all there", "no memory"])
def test_where_none_arrive_the_host_is_asked_for_nothing(engine, monkeypatch, why):
    away, there = layers()
    patcher, arrivals = Patcher(why == "dynamic VRAM"), Arrivals()
    if why == "Offload":
        monkeypatch.setattr(arriving, "LeavesOut", Patcher)
    if why == "no streams":
        # As with the host's --disable-async-offload.
        monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 0)
    if why == "all there":
        arrivals.start(patcher, lambda: [[away]])
        patcher.asked.clear()
    if why == "no memory":

        def full(*_):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(arriving, "_Landing", full)
    arrivals.start(patcher, lambda: [[there if why == "all there" else away]])
    assert len(patcher.asked) == (why == "no memory")
    before = away.weight
    with arrivals.arriving([away, there], DEVICE) as for_now:
        assert not for_now and away.weight is before


@pytest.mark.parametrize("inference", [True, False])
def test_quantized_weights_arrive(inference):
    """On the CPU, where copies are real: the layers are said to be on another device."""
    layer = torch.nn.Module()
    with torch.inference_mode(inference):
        quantized = QuantizedTensor.from_float(torch.randn(32, 32), "TensorCoreFP8E4M3Layout", scale="recalculate")
        layer.weight = torch.nn.Parameter(quantized, requires_grad=False)
    pieces, size = arriving.pieces_of([layer], there=DEVICE)
    landing = arriving._Landing(arriving.copy_engine(torch.device("cpu")), torch.device("cpu"), size)
    with torch.inference_mode(), landing.holding(pieces) as ((_, arrived),):
        assert isinstance(arrived, QuantizedTensor) and arrived._qdata.data_ptr() != quantized._qdata.data_ptr()
        assert torch.equal(arrived.dequantize(), quantized.dequantize())
