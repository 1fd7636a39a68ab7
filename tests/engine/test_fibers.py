"""Devices whose blocks were recorded take turns on one thread; where one was not, threads do."""

import contextvars
import sys
import threading
from functools import partial

import pytest
import torch
from hotpath_pack.hotpath import fibers
from hotpath_pack.hotpath.exchange import GivenRows, keys_and_values
from hotpath_pack.hotpath.fibers import Fibers
from hotpath_pack.hotpath.first_run import waits_for_others
from hotpath_pack.hotpath.pieces import PieceRecorder
from hotpath_pack.hotpath.split import Crew
from test_pieces import Log

DEVICES = [torch.device("cpu"), torch.device("cpu", 1)]
COUNTS = (2, 3)


class Block:
    """Adds what all devices have, as the keys of one block, to what one has."""

    def __init__(self, place):
        self.x = torch.empty(1, 1, COUNTS[place], 1)
        self.others = sum(COUNTS) - COUNTS[place]
        self.recording = None

    def launch(self, weights=None):
        rows = GivenRows(self.x, self.x, self.others)
        keys, _ = keys_and_values(rows.take())
        self.x.add_(keys.sum(2, keepdim=True))

    def record(self):
        with Log() as log:
            self.recording = PieceRecorder(torch.device("cpu"), log).record(self.launch, {})

    def run(self):
        self.recording.replay() if self.recording else self.launch()


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """What is not recorded calls operators, as compiled code does."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.fixture
def crew():
    made = Crew(DEVICES, lambda device: None)
    yield made
    made.end()


def shared_out(crew, blocks, turns=3):
    """The sum of what each device has after some turns, and the threads that computed it."""
    threads = set()

    def work(place, tensors):
        blocks[place].x.copy_(tensors[0])
        for _ in range(turns):
            assert waits_for_others()
            blocks[place].run()
            threads.add(threading.get_ident())
        return blocks[place].x.clone()

    given = [[torch.arange(1.0, count + 1)[None, None, :, None]] for count in COUNTS]
    out = crew.run(given, COUNTS, work)
    assert not waits_for_others()
    return [part.flatten().tolist() for part in out], threads


def test_what_was_recorded_takes_turns_on_one_thread_and_all_else_on_several(crew):
    blocks = [Block(place) for place in range(2)]
    want, threads = shared_out(crew, blocks)
    assert len(threads) == 2
    for block in blocks:
        block.record()
    # Whether all was recorded is known once it ran.
    for expected in (2, 1, 1):
        got, threads = shared_out(crew, blocks)
        assert (got, len(threads)) == (want, expected)
        assert crew.in_fibers == (expected == 1)
    blocks[1].recording = None
    got, threads = shared_out(crew, blocks)
    assert got == want and len(threads) == 2 and not crew.in_fibers
    blocks[1].record()
    assert [len(shared_out(crew, blocks)[1]) for _ in range(2)] == [2, 1]


def test_without_greenlet_threads_do_it(crew, monkeypatch):
    monkeypatch.setitem(sys.modules, "greenlet", None)
    # What was found before is kept.
    monkeypatch.setattr(fibers, "available", fibers.available.__wrapped__)
    blocks = [Block(place) for place in range(2)]
    for block in blocks:
        block.record()
    assert not fibers.available()
    assert [len(shared_out(crew, blocks)[1]) for _ in range(3)] == [2, 2, 2]


def test_fibers_go_on_in_the_order_in_which_they_are_woken_and_know_the_callers_context():
    variable, seen = contextvars.ContextVar("variable", default=0), []
    variable.set(1)
    turns = Fibers(lambda place: seen.append(f"{place} goes on"))

    def part(place):
        seen.append(f"{place} begins with {variable.get()}")
        variable.set(2 + place)
        if place == 2:
            turns.wake(1)
            turns.wake(0)
            return
        turns.sleep(place)
        seen.append(f"{place} has {variable.get()}")

    turns.run([partial(part, place) for place in range(3)])
    begins = [f"{place} begins with 1" for place in range(3)]
    assert seen == [*begins, "1 goes on", "1 has 3", "0 goes on", "0 has 2"] and variable.get() == 1
