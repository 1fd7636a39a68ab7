"""Recordings in pieces: no memory is taken within one, and it computes what the code does."""

import gc
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hotpath_pack.hotpath import pieces
from hotpath_pack.hotpath.cuda_graphs import Busy, undisturbed
from hotpath_pack.hotpath.exchange import GivenRows
from hotpath_pack.hotpath.first_run import alone
from hotpath_pack.hotpath.graphs import compile_graph, load_graph
from hotpath_pack.hotpath.internals import memory
from hotpath_pack.hotpath.internals.memory import lends
from hotpath_pack.hotpath.limits import compiling
from hotpath_pack.hotpath.pieces import Arena, PieceRecorder, Unrecordable, _Full
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


class Log(TorchDispatchMode):
    """Records operators that write memory which they are given, as a CUDA graph does, and runs none of them; and
    attention, whose memory is its own."""

    def __init__(self):
        super().__init__()
        self.calls, self.begun, self.abandoned = None, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if self.calls is not None and name.startswith("aten::_scaled_dot_product_"):
            out = func(*args, **kwargs or {})
            self.calls.append(lambda: [to.copy_(of) for to, of in zip(out, func(*args, **kwargs or {}), strict=True)])
            return out
        if self.calls is None or not func._schema.is_mutable or name == "aten::set_":
            return func(*args, **kwargs or {})
        self.calls.append(partial(func, *args, **kwargs or {}))
        return args[0]

    def stream(self):
        return nullcontext()

    def begin(self):
        self.begun += 1
        self.calls = []

    def end(self):
        made, self.calls = Logged(self.calls), None
        return made

    def abandon(self, error):
        self.abandoned += 1
        self.calls = None


class Logged:
    def __init__(self, calls):
        self.calls = calls

    def replay(self):
        for call in self.calls:
            call()

    def reset(self):
        self.calls = None


class Runs:
    """Runs what it records."""

    def __init__(self):
        self.ended = 0

    def stream(self):
        return nullcontext()

    def begin(self):
        pass

    def end(self):
        self.ended += 1
        return Logged([])

    def abandon(self, error):
        pass


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 2000)), max_size=40), st.randoms())
@settings(deadline=None)
def test_what_is_lent_is_lent_to_one(asked, random):
    arena, kept = Arena(40_000, CPU), {}
    for number, (letting_go, count) in enumerate(asked):
        for _ in range(min(letting_go, len(kept))):
            kept.pop(random.choice(list(kept)))
        try:
            tensor = arena.lend((count,), (1,), torch.float32)
        except _Full:
            assert sum(-(-each.nbytes // 512) * 512 for each in kept.values()) + count * 4 > 10_000
            continue
        kept[number] = tensor.fill_(number)
        assert tensor.data_ptr() % 64 == arena._start % 64
        for each, other in kept.items():
            assert other.eq(each).all()


def test_a_view_keeps_what_was_lent():
    arena = Arena(1024, CPU)
    view = arena.lend((128,), (1,), torch.float32)[:4].view(2, 2)
    with pytest.raises(_Full):
        arena.lend((200,), (1,), torch.float32)
    del view
    assert arena.lend((200,), (1,), torch.float32).shape == (200,)


def attend(x, w):
    q, k, v = (x @ w).reshape(1, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mul(2)[0]


@pytest.mark.parametrize("inference", [False, True])
def test_replays_compute_what_the_code_does(inference):
    with torch.inference_mode(inference):
        x, out, w = torch.randn(10, 16), torch.empty(10, 16), torch.randn(16, 48)
        log = Log()
        recorder = PieceRecorder(CPU, log)

        def run(weights):
            x.add_(1)
            out.copy_(attend(x, weights["w"]))

        before = x.clone()
        with log:
            recording = recorder.record(run, {"w": w})
        assert torch.equal(x, before)
        assert recorder.bytes
        for _ in range(3):
            x.normal_()
            w.normal_()
            want = attend(x + 1, w)
            recording.replay()
            assert torch.equal(out, want)
        recording.reset()
        with pytest.raises(AssertionError):
            recording.replay()
        recorder.forget()
        assert not recorder.bytes


def test_what_meets_others_is_called_between_and_meets_nobody_while_it_is_recorded(monkeypatch):
    # Compiled code calls operators.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, out = torch.randn(1, 2, 4, 8), torch.ones(3, 2, 1, 2, 8)

    def run(weights):
        x.add_(1)
        rows = GivenRows(x, x, 3)
        out.mul_(5)
        out.add_(rows.take(after=out))

    log = Log()
    before = x.clone(), out.clone()
    with log:
        recording = PieceRecorder(CPU, log).record(run, {})
    assert torch.equal(x, before[0]) and torch.equal(out, before[1])
    with alone():
        recording.replay()
    assert torch.equal(x, before[0] + 1) and torch.equal(out, 5 * before[1])


@pytest.mark.parametrize(
    "does",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: x.to("meta"),
        lambda x: torch.zeros(3, device="meta").add_(1),
    ],
    ids=["a number", "a size", "a mask", "another device", "memory of another device"],
)
def test_what_waits_for_the_device_is_refused_before_it_runs(does):
    log = Log()
    x = torch.ones(4)
    with log, pytest.raises(Unrecordable):
        PieceRecorder(CPU, log).record(lambda weights: does(x), {})
    assert log.calls is None


@pytest.mark.parametrize("loaded", [False, True], ids=["compiled", "loaded"])
def test_inductors_code_takes_no_memory(loaded, monkeypatch, tmp_path):
    class CalledAtOnce(pieces._Call):
        def __init__(self, *told):
            super().__init__(*told)
            self.replay()

    monkeypatch.setattr(pieces, "_Call", CalledAtOnce)

    def region(weights, inputs):
        return {"x": torch.tanh(attend(inputs["x"], weights["w"])) @ weights["v"]}

    weights = {"w": torch.randn(16, 48), "v": torch.randn(16, 16)}
    x, out = torch.randn(10, 16), torch.empty(10, 16)
    graph = compile_graph(region, {}, weights, {"x": x}, ((10, 16),), {}, None)
    want = graph(weights, {"x": x})["x"]
    if loaded:
        graph = load_graph(graph.to_bytes(), region, {}, tmp_path)
        gc.collect()
    runs = Runs()
    recorder = PieceRecorder(CPU, runs)
    places = []

    def run(weights):
        made = graph(weights, {"x": x})["x"]
        places.append(made.data_ptr())
        out.copy_(made)

    recorder.record(run, weights)
    assert torch.equal(out, want)
    arena = recorder._arena
    assert all(arena._start <= place < arena._start + arena.bytes for place in places)
    assert recorder.bytes < 10_000


def test_what_needs_more_memory_outgrows_what_needed_less(monkeypatch):
    monkeypatch.setattr(pieces, "_Call", lambda *told: Logged([]))
    recorder = PieceRecorder(CPU, Runs())
    w = torch.randn(16, 48)

    def record(rows):
        x, out = torch.randn(rows, 16), torch.empty(rows, 16)
        return recorder.record(lambda weights: out.copy_(attend(x, weights["w"])), {"w": w})

    first, second = record(10), record(10)
    alone = recorder.bytes
    large = record(70)
    assert [recorder.outgrown(each) for each in (first, second, large)] == [True, True, False]
    both = recorder.bytes
    first.reset()
    again = record(10)
    assert not recorder.outgrown(again) and recorder.bytes == both
    second.reset()
    assert recorder.bytes == both - alone, "all share what the largest needs"


def test_inductors_code_takes_memory_as_ever_in_other_threads_and_after():
    from threading import Thread

    graph = compile_graph(lambda weights, inputs: inputs["x"] + 1, {}, {}, {"x": torch.ones(4)}, ((4,),), {}, None)
    lent = []

    def lend(size, stride, dtype):
        lent.append(size)
        return torch.empty(size, dtype=dtype)

    before = [code["empty_strided_cpu"] for code in memory._code.values()]
    with lends(CPU, lend):
        thread = Thread(target=graph, args=({}, {"x": torch.ones(4)}))
        thread.start()
        thread.join()
        assert not lent
        graph({}, {"x": torch.ones(4)})
        assert lent == [(4,)]
    assert before == [code["empty_strided_cpu"] for code in memory._code.values()]


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is not built for CUDA")
def test_a_pytorch_without_what_recordings_need_records_nothing(monkeypatch):
    assert memory.recordable()
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    assert not memory.recordable()


def test_inductors_code_that_takes_memory_otherwise_is_not_recorded(monkeypatch):
    class Runner:
        pass

    runner = Runner()
    monkeypatch.setattr(memory, "_code", {runner: {"empty_strided_cpu_v2": torch.empty_strided}})
    with pytest.raises(RuntimeError, match="not known"), lends(CPU, torch.empty_strided):
        pass


@pytest.mark.parametrize("other", [compiling, undisturbed], ids=["compiles", "records"])
def test_nothing_is_recorded_while_another_thread_gives_memory_back(other):
    begun, end = threading.Event(), threading.Event()

    def work():
        with other():
            begun.set()
            end.wait()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    with pytest.raises(Busy), undisturbed():
        pytest.fail("another thread is at it")
    end.set()
    thread.join()
    assert gc.isenabled()
    with pytest.raises(ValueError), undisturbed():
        assert not gc.isenabled(), "what is collected may hold memory of the device"
        raise ValueError
    assert gc.isenabled()
