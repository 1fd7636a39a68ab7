"""Threads that start at once, as those of a host with several GPUs do. PyTorch's tracing is not made for that."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hotpath_pack.hotpath.compiled import Region
from hotpath_pack.hotpath.counters import graphs_so_far
from hotpath_pack.hotpath.limits import compiling, nobody_compiling
from hotpath_pack.hotpath.settings import CompileSettings
from hotpath_pack.hotpath.waiting import while_waiting
from torch import nn
from torch.nn import Linear

ROUNDS = 20


class Block(nn.Module):
    """Mutates its input, as Flux blocks do."""

    def __init__(self, width):
        super().__init__()
        self.linear = Linear(width, width, device="meta")

    def forward(self, x):
        x += self.linear(x)
        return x.relu()


def run(region, width, errors, barrier, tokens=(5, 7)):
    try:
        barrier.wait()
        with torch.inference_mode():
            for count in tokens:
                w, x = torch.randn(width, width), torch.randn(1, count, width)
                b = torch.zeros(width)
                want = (x + x @ w.t()).relu()
                out = region({"linear.weight": w, "linear.bias": b}, {"x": x}, {"x": (1,)})
                torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    # A thread's error would be lost.
    except BaseException as error:
        errors.append(error)


def start_at_once(regions, width):
    errors, barrier = [], threading.Barrier(len(regions))
    threads = [threading.Thread(target=run, args=(region, width, errors, barrier)) for region in regions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def rounds(backend, count):
    for number in range(count):
        width = 8 + 8 * (number % 3)
        settings, before = CompileSettings(backend=backend), graphs_so_far()
        made = [Region("double block", Block(width), lambda inputs: inputs, settings) for _ in range(2)]
        start_at_once(made, width)
        assert [region.stats.graphs for region in made] == [1, 1]
        shared = Region("single block", Block(width), lambda inputs: inputs, settings)
        start_at_once([shared, shared], width)
        assert (shared.stats.graphs, shared.stats.recompiles, graphs_so_far() - before) == (1, [], 3)


def test_two_threads_that_compile_at_once_are_right_and_counted_twenty_times_in_a_row():
    """In a process of its own, since what went wrong was a segmentation fault, of threads that had ended too."""
    path = str(Path(__file__).parent.parent)
    code = f"import sys; sys.path[:0] = [{path!r}, {path + '/engine'!r}]; import conftest, test_threads as t; "
    code += f"t.rounds('aot_eager', {ROUNDS})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])


def test_a_wait_for_a_thread_that_compiles_can_be_ended():
    begun, go = threading.Event(), threading.Event()

    def hold():
        with compiling():
            begun.set()
            assert go.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert begun.wait(60)

    def interrupt():
        raise KeyboardInterrupt

    # The host's interrupt is no Exception.
    with pytest.raises(KeyboardInterrupt), while_waiting(interrupt), compiling():
        raise AssertionError("two compile at once")
    go.set()
    other.join()
    with compiling(), nobody_compiling() as free:
        assert free
