"""Workers that share a store: of three that start at once one compiles, and none waits for one that was killed."""

import errno
import json
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from hotpath_pack.hotpath import graphs, turns
from hotpath_pack.hotpath.turns import Turn
from hotpath_pack.hotpath.waiting import while_waiting

TESTS = str(Path(__file__).resolve().parent.parent)
# For each line it reads it does what a worker does for its first prompt; ``slow`` stores so that it can be killed.
WORKER = f"""
import sys; sys.path[:0] = [{TESTS!r}, {TESTS + "/engine"!r}]
import conftest, json, pathlib, test_graphs as t, time, torch
from hotpath_pack.hotpath.artifacts import Store
from hotpath_pack.hotpath.later import Later

folder, later = pathlib.Path(sys.argv[1]), Later()
if sys.argv[2] == "slow":
    Store.write = lambda *args: (print("storing", flush=True), time.sleep(600))
print("ready", flush=True)
while sys.stdin.readline():
    made = t.region(folder, backend="eager")
    made._later = later.add
    w, x = t.weights(), torch.randn(1, 5, 8)
    with torch.inference_mode():
        want = t.expected(w, x.clone())
        out = made(w, {{"x": x.clone()}}, t.DIMS)
    later.wait()
    told = dict(right=torch.allclose(out, want, atol=1e-5), graphs=made.stats.graphs, loaded=made.stats.loaded)
    print(json.dumps(told), flush=True)
"""
pytestmark = pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")


@pytest.fixture
def start(tmp_path):
    started = []

    def start(count, slow=""):
        command = [sys.executable, "-c", WORKER, str(tmp_path / "kept"), slow]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        workers = [subprocess.Popen(command, **pipes) for _ in range(count)]
        started.extend(workers)
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        return workers

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


def begin(workers):
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()


def told(workers):
    found = [json.loads(worker.stdout.readline()) for worker in workers]
    assert all(each["right"] for each in found)
    return sorted((each["graphs"], each["loaded"]) for each in found)


def test_three_workers_at_once_compile_once_on_an_empty_store_and_not_on_a_full_one(start):
    workers = start(3)
    for expected in ([(0, 1), (0, 1), (1, 0)], [(0, 1), (0, 1), (0, 1)]):
        begin(workers)
        assert told(workers) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="has no signal that ends a process so")
def test_the_next_goes_on_when_the_one_that_compiles_is_killed_as_it_stores(start):
    first, others = start(1, "slow"), start(1)
    begin(first)
    assert first[0].stdout.readline() == "storing\n"
    begin(others)
    # Longer than it takes to find that another has the turn; as long as it doesn't compile, it says nothing.
    assert not select.select([worker.stdout for worker in others], [], [], 1)[0], "it waits for the first"
    first[0].send_signal(signal.SIGKILL)
    assert told(others) == [(1, 0)]


def test_a_turn_is_one_processs_at_a_time_and_whoever_has_one_waits_for_no_other(tmp_path):
    hold = "import sys; sys.path.insert(0, sys.argv[1]); import conftest; from pathlib import Path\n"
    hold += "from hotpath_pack.hotpath.turns import Turn\n"
    hold += "turn = Turn(Path(sys.argv[2])); turn.take(); print('has it', flush=True); sys.stdin.readline()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, TESTS, str(tmp_path / "a.kept")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"has it\n"
    mine, second = Turn(tmp_path / "a.kept"), Turn(tmp_path / "b.kept")
    started = time.monotonic()
    assert mine.take(patience=0.3) and time.monotonic() - started >= 0.3, "it waits as long as it is told to"
    # The host's interrupt is no Exception.
    with pytest.raises(KeyboardInterrupt), while_waiting(Mock(side_effect=[None, KeyboardInterrupt])):
        mine.take()
    assert time.monotonic() - started < turns.PATIENCE / 10
    with second:
        assert second.take()
        started = time.monotonic()
        assert mine.take() and time.monotonic() - started < turns.PATIENCE / 10
    other.communicate(b"\n")
    with mine:
        assert mine.take() and not mine.take() and not Turn(tmp_path / "a.kept").take(), "this process has it"
        done = mine.then(lambda: None)
    assert not Turn(tmp_path / "a.kept").take(), "until what it compiled is stored"
    done()
    again = Turn(tmp_path / "a.kept")
    assert again.take()
    again.leave()
    assert not Turn(None).take()


@pytest.mark.skipif(sys.platform == "win32", reason="its locks are of another module")
def test_nobody_waits_where_a_file_system_has_no_locks(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    turn, started = Turn(tmp_path / "a.kept"), time.monotonic()
    with turn:
        assert turn.take() and time.monotonic() - started < turns.PATIENCE / 10
    monkeypatch.undo()
    with turn:
        assert turn.take() and not turn.take()
