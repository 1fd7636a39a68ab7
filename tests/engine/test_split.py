"""Tokens in shares, masks of them, and threads that give each other keys and values: right, and never for ever."""

import threading
import time
from functools import partial

import pytest
import torch
from hotpath_pack.hotpath import exchange, fibers
from hotpath_pack.hotpath.compiled import Region
from hotpath_pack.hotpath.exchange import Abandoned, exchanged, give, take
from hotpath_pack.hotpath.first_run import alone, first_run, stands_in, waiting_for_others
from hotpath_pack.hotpath.settings import CompileSettings
from hotpath_pack.hotpath.split import (
    FEWEST_TOKENS,
    Crew,
    DeviceFailed,
    NotShared,
    places_of,
    share_of_mask,
    shares,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import Linear
from torch.nn.functional import scaled_dot_product_attention

DEVICES = [torch.device("cpu", number) for number in range(3)]


@pytest.fixture(params=["threads", "fibers"])
def crew(request, monkeypatch):
    if request.param == "threads":
        monkeypatch.setattr(fibers, "available", lambda: False)
    made = Crew(DEVICES, lambda device: None)
    # As if something had run before, and waited within no operator.
    made.between = True
    yield made
    made.end()


@given(tokens=st.integers(0, 99), parts=st.integers(1, 8))
@settings(max_examples=40)
def test_shares_are_all_tokens_in_order_and_even(tokens, parts):
    if tokens < FEWEST_TOKENS * parts:
        with pytest.raises(NotShared, match="too few"):
            shares(tokens, parts)
        return
    found = shares(tokens, parts)
    assert [token for share in found for token in range(tokens)[share]] == list(range(tokens))
    counts = {share.stop - share.start for share in found}
    assert len(found) == parts and max(counts) - min(counts) <= 1


@given(text=st.integers(6, 15), image=st.integers(6, 15), seed=st.integers(0, 9), rows=st.booleans())
@settings(max_examples=10)
def test_each_device_attends_as_its_rows_of_the_whole_do(text, image, seed, rows):
    generator, total = torch.Generator().manual_seed(seed), text + image
    q, k, v = torch.randn(3, 1, 2, total, 8, generator=generator)
    mask = torch.randn(1, 1, total if rows else 1, total, generator=generator)
    want = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    places = places_of([shares(text, 3), shares(image, 3)])
    rows_of = [torch.cat([torch.arange(total)[each] for each in place]) for place in places]
    for place, mine in enumerate(rows_of):
        order = torch.cat([mine, *rows_of[:place], *rows_of[place + 1 :]])
        assert sorted(order.tolist()) == list(range(total))
        share = share_of_mask(mask, places, place)
        got = scaled_dot_product_attention(q[:, :, mine], k[:, :, order], v[:, :, order], attn_mask=share)
        torch.testing.assert_close(got, want[:, :, mine], atol=1e-5, rtol=1e-5)
    with pytest.raises(NotShared, match="is not one of"):
        share_of_mask(mask[..., 1:], places, 0)


def met(place, tensors, counts=(1, 1, 1)):
    """What the device at ``place`` has of all when it gave ``tensors[0]``."""
    theirs = torch.full((sum(counts) - counts[place],), -1)
    give(tensors[0], theirs)
    take(theirs)
    return [*tensors[0].tolist(), *theirs.tolist()]


def test_devices_have_their_own_and_what_all_gave_in_order_each_time(crew):
    counts = (2, 1, 3)
    given = [torch.arange(count) + 10 * place for place, count in enumerate(counts)]

    def work(place, tensors):
        assert torch.is_inference_mode_enabled()
        for turn in range(20):
            others = [rows for other, rows in enumerate(given) if other != place]
            want = (torch.cat([given[place], *others]) + turn).tolist()
            assert met(place, [tensors[0] + turn], counts) == want
        return tensors[0]

    with torch.inference_mode():
        out = crew.run([[rows] for rows in given], counts, work)
    assert crew.in_fibers == fibers.available()
    assert [rows.tolist() for rows in out] == [rows.tolist() for rows in given]


def test_rows_that_are_not_those_of_the_device_are_refused(crew):
    with pytest.raises(DeviceFailed, match="1 rows and 3 of others are not 1 and 2"):
        crew.run([[torch.zeros(1, dtype=torch.long)]] * 3, (1, 1, 1), partial(met, counts=(2, 1, 1)))


def test_what_fails_while_rows_are_moved_ends_all(crew):
    """Rows of another shape: the last to come sees it, the others wait for it."""
    ended = []

    def work(place, tensors):
        try:
            rows = torch.zeros(1, 2 + (place == 1))
            give(rows, theirs := rows.new_empty(2, rows.shape[1]))
            take(theirs)
        except BaseException as error:
            ended.append(type(error))
            raise

    with pytest.raises(DeviceFailed, match="size"):
        crew.run([[torch.zeros(1, dtype=torch.long)]] * 3, (1, 1, 1), work)
    assert sorted(ended, key=str) == sorted([RuntimeError, Abandoned, Abandoned], key=str)


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("before", [0, 2])
def test_a_device_that_fails_ends_all_and_is_named(crew, failing, before):
    ended = []

    def work(place, tensors):
        try:
            for turn in range(4):
                if place == failing and turn == before:
                    raise torch.OutOfMemoryError("no memory left")
                met(place, tensors)
            return tensors[0]
        except BaseException as error:
            ended.append(type(error))
            raise

    for _ in range(2):
        with pytest.raises(DeviceFailed, match=f"^cpu:{failing} failed: no memory left$") as failure:
            crew.run([[torch.zeros(1, dtype=torch.long)]] * 3, (1, 1, 1), work)
        assert isinstance(failure.value.__cause__, torch.OutOfMemoryError)
    assert sorted(ended, key=str) == sorted(2 * [torch.OutOfMemoryError, Abandoned, Abandoned], key=str)


def test_what_failed_is_waited_for_before_its_memory_is_used_again(crew, monkeypatch):
    """A device may fail between giving and taking, while rows are on their way to it."""
    cards, waited = tuple(torch.device("cuda", number) for number in range(3)), []

    def synchronize(device):
        waited.append(device)
        if device == cards[1]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def work(place, tensors):
        give(tensors[0], theirs := tensors[0].new_empty(2))
        if place == 1:
            raise torch.OutOfMemoryError("no memory left")
        take(theirs)
        return tensors[0]

    crew.devices = cards
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(DeviceFailed, match="^cuda:1 failed: no memory left$"):
        crew.run([[torch.zeros(1, dtype=torch.long)]] * 3, (1, 1, 1), work)
    assert waited == list(cards)


def test_a_device_that_gathers_less_often_ends_all(crew):
    def work(place, tensors):
        for _ in range(3 if place else 2):
            met(place, tensors)
        return tensors[0]

    with pytest.raises(DeviceFailed, match="ended before this one"):
        crew.run([[torch.zeros(1, dtype=torch.long)]] * 3, (1, 1, 1), work)


def test_what_ends_a_thread_before_its_work_and_an_interrupt_reach_the_caller(crew):
    class Interrupt(BaseException):
        pass

    def work(place, tensors):
        if place == 1:
            raise Interrupt
        met(place, tensors)
        return tensors[0]

    with pytest.raises(Interrupt):
        crew.run([[torch.zeros(1, dtype=torch.long)]] * 3, (1, 1, 1), work)

    def enter(device):
        raise OSError("the device is gone")

    broken = Crew(DEVICES[:2], enter)
    with pytest.raises(DeviceFailed, match="cpu:1 failed: the device is gone"):
        broken.run([[torch.zeros(1, dtype=torch.long)]] * 2, (1, 1), partial(met, counts=(1, 1)))
    broken.end()
    with pytest.raises(DeviceFailed, match="after shutdown"):
        broken.run([[torch.zeros(1, dtype=torch.long)]] * 2, (1, 1), partial(met, counts=(1, 1)))


def test_one_thread_runs_at_a_time(crew):
    running, turns = [], []

    def work(place, tensors):
        for turn in range(30):
            running.append(place)
            time.sleep(0.0005)
            assert running == [place]
            running.remove(place)
            turns.append(turn)
            assert met(place, [tensors[0] + turn])[0] == turn
        return tensors[0]

    crew.run([[torch.zeros(1, dtype=torch.long)]] * 3, (1, 1, 1), work)
    assert turns == sorted(turns) and len(turns) == 90, "none is more than a turn ahead"


@pytest.mark.parametrize("turns", [0, 1])
def test_an_interrupt_of_one_that_waits_leaves_nobody_waiting(crew, turns, monkeypatch):
    """As a signal ends the main thread's wait, whether it waits for rows or to run."""
    acquired = []

    class Interrupted:
        def __init__(self, lock):
            self.lock = lock

        def acquire(self):
            acquired.append(1)
            if len(acquired) > turns:
                raise KeyboardInterrupt
            return self.lock.acquire()

        def release(self):
            self.lock.release()

    begin = exchange.Threads.__init__

    def broken(self, *args):
        begin(self, *args)
        self._go[0] = Interrupted(self._go[0])

    monkeypatch.setattr(exchange.Threads, "__init__", broken)
    monkeypatch.setattr(fibers, "available", lambda: False)

    def work(place, tensors):
        for _ in range(4):
            # The first to come waits for the others.
            time.sleep(0.01 * (place == 0))
            met(place, tensors)
        return tensors[0]

    with pytest.raises(KeyboardInterrupt):
        crew.run([[torch.zeros(1, dtype=torch.long)]] * 3, (1, 1, 1), work)


class Block(nn.Module):
    """Attends with its tokens and writes over them, as Flux blocks do."""

    def __init__(self):
        super().__init__()
        self.qkv = Linear(8, 24, device="meta")

    def forward(self, x, others):
        q, k, v = self.qkv(x).view(1, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        x += scaled_dot_product_attention(q, *exchanged(k, v, others)).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("each_its_own", [True, False])
def test_threads_whose_code_runs_for_the_first_time_do_not_wait_for_each_other(crew, each_its_own):
    """While one compiles and runs, with the lock, the others wait for the lock, and it must not wait for them."""
    bind, made = (lambda inputs: inputs), CompileSettings(backend="aot_eager")
    regions = [Region("block", Block(), bind, made) for _ in range(3 if each_its_own else 1)] * (
        1 if each_its_own else 3
    )
    weights = {"qkv.weight": torch.randn(24, 8), "qkv.bias": torch.randn(24)}
    x = torch.randn(1, 15, 8)

    def work(place, tensors):
        mine = tensors[0].clone()
        for _ in range(2):
            mine = regions[place](weights, {"x": mine, "others": 10}, {"x": (1,)})
        return mine

    want = x.clone()
    for _ in range(2):
        q, k, v = (want @ weights["qkv.weight"].t() + weights["qkv.bias"]).view(1, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        want += scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out, errors = [], []

    def run():
        try:
            out.append(torch.cat(crew.run([[x[:, share]] for share in shares(15, 3)], (5, 5, 5), work), 1))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive() and not errors, errors
    torch.testing.assert_close(out[0], want, atol=1e-4, rtol=1e-4)
    assert {region.stats.graphs for region in regions} == {1}


def test_nothing_stands_in_but_where_code_runs_first_while_others_are_waited_for():
    x = torch.zeros(2)
    assert not stands_in()
    with first_run({"x": x}) as single:
        assert not stands_in()
    assert not single.again()
    with waiting_for_others(), first_run({"x": x}) as first:
        x += 1
        assert stands_in()
    assert first.again() and x.tolist() == [0, 0] and not stands_in()
    with alone():
        assert stands_in()
        give(x + 1, theirs := torch.ones(3))
        take(theirs)
    assert theirs.tolist() == [0, 0, 0] and not stands_in()
