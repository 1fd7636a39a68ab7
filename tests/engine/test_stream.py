"""Streamed weights: what is resident, what is copied when, and that no block computes with another's bytes."""

import pytest
import torch
from hotpath_pack.devtools.copies import LateCopies
from hotpath_pack.hotpath.stream import (
    ORDERS,
    InPlaceCopies,
    Stream,
    fetches,
    leaving_order,
    predict,
    resident_blocks,
)
from hypothesis import given
from hypothesis import strategies as st

SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=24)


@given(sizes=SIZES, share=st.floats(0, 1.2), order=st.sampled_from(ORDERS))
def test_resident_blocks_fit_and_one_streamed_block_less_would_not(sizes, share, order):
    budget = share * sum(sizes)
    stay = resident_blocks(sizes, budget, order)
    assert sum(sizes[block] for block in stay) <= budget
    if len(set(sizes)) == 1 and len(stay) < len(sizes):
        assert (len(stay) + 1) * sizes[0] > budget


@given(count=st.integers(1, 60), share=st.floats(0, 1))
def test_streamed_blocks_are_spread_at_even_distances(count, share):
    streamed = sorted(set(range(count)) - resident_blocks([1] * count, share * count))
    if len(streamed) > 1:
        gaps = [after - before for before, after in zip(streamed, [*streamed[1:], streamed[0] + count], strict=True)]
        assert max(gaps) - min(gaps) <= 1 and sum(gaps) == count


def test_first_and_last():
    assert resident_blocks([2, 2, 2, 2], 5, "first") == {0, 1}
    assert resident_blocks([2, 2, 2, 2], 5, "last") == {2, 3}
    with pytest.raises(ValueError, match="resident: 'best' is unknown"):
        resident_blocks([1], 1, "best")


@given(blocks=st.lists(st.lists(st.integers(0, 2**27), max_size=4), max_size=24), order=st.sampled_from(ORDERS))
def test_each_layer_leaves_once(blocks, order):
    left = leaving_order(blocks, order)
    assert sorted(left) == [(block, layer) for block, layers in enumerate(blocks) for layer in range(len(layers))]


def test_first_and_last_leave_block_by_block():
    assert leaving_order([[1], [1, 2]], "first") == [(1, 0), (1, 1), (0, 0)]
    assert leaving_order([[1], [1, 2]], "last") == [(0, 0), (1, 0), (1, 1)]
    with pytest.raises(ValueError, match="resident: 'best' is unknown"):
        leaving_order([[1]], "best")


@pytest.mark.parametrize("resident", range(1, 17))
def test_layers_that_left_are_spread_so_that_a_step_takes_the_larger_of_compute_and_bus(resident):
    """Flux.1 in bf16 with modulation made ahead, its compute and bus as measured on an H100, at any memory."""
    double, single = [56_623_104, 18_874_368, 75_497_472, 75_497_472] * 2, [132_120_576, 94_371_840]
    blocks = [double] * 19 + [single] * 38
    seconds, bandwidth = [2.63e-3] * 19 + [2.29e-3] * 38, 55e9
    streamed, left = [0] * len(blocks), sum(map(sum, blocks))
    for block, layer in leaving_order(blocks):
        if left <= resident * 2**30:
            break
        streamed[block] += blocks[block][layer]
        left -= blocks[block][layer]
    turns = [block for block, size in enumerate(streamed) if size]
    step = predict(streamed, seconds, bandwidth, turns, ahead=1, steps=6) if turns else sum(seconds)
    assert step <= 1.05 * max(sum(seconds), sum(streamed) / bandwidth)


def bytes_of(block):
    return torch.full((3 + block % 4,), block, dtype=torch.uint8)


def pieces(block):
    whole = bytes_of(block)
    return [(whole[:2], 0), (whole[2:], 2)]


@given(
    streamed=st.sets(st.integers(0, 30), min_size=1, max_size=12).map(sorted),
    ahead=st.integers(0, 4),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_a_block_computes_with_its_own_bytes_in_whatever_order_copies_and_blocks_come(streamed, ahead, seed, data):
    engine = LateCopies(seed)
    stream = Stream(engine, torch.device("cpu"), 8, streamed, ahead, pieces)
    turns = streamed * 3 if data.draw(st.booleans()) else data.draw(st.lists(st.sampled_from(streamed), max_size=30))
    assert len(stream.slots) == min(ahead + 1, len(streamed)), "never more on the device than the slots"
    for block in turns:
        with stream.present(block) as slot:
            for _ in range(3):
                assert torch.equal(stream.slots[slot][: 3 + block % 4], bytes_of(block))
                engine.some()
        if data.draw(st.integers(0, 9)) == 0:
            stream.drain()
            assert not engine.pending


@given(
    streamed=st.sets(st.integers(0, 30), min_size=1, max_size=12).map(sorted),
    ahead=st.integers(0, 4),
    data=st.data(),
)
def test_a_slot_in_use_or_wanted_next_is_never_overwritten(streamed, ahead, data):
    slots = [None] * min(ahead + 1, len(streamed))
    for _ in range(20):
        block = data.draw(st.sampled_from(streamed))
        turn = streamed.index(block)
        wanted = {(streamed * 2)[turn + distance] for distance in range(min(ahead, len(streamed) - 1) + 1)}
        planned = fetches(slots, block, streamed, ahead)
        assert len({fetch.slot for fetch in planned}) == len(planned)
        assert block in slots or planned[0].block == block
        for fetch in planned:
            assert slots[fetch.slot] not in wanted and fetch.block in wanted
            slots[fetch.slot] = fetch.block
        assert set(slots) >= wanted


def test_steady_streaming_copies_each_block_once_a_step():
    stream = Stream(InPlaceCopies(), torch.device("cpu"), 8, [1, 3, 5, 7], 1, pieces)
    per_step = []
    for _ in range(4):
        before = stream.bytes_copied
        for block in (1, 3, 5, 7):
            with stream.present(block) as slot:
                assert torch.equal(stream.slots[slot][: 3 + block % 4], bytes_of(block))
        per_step.append(stream.bytes_copied - before)
    assert per_step[1:] == [sum(len(bytes_of(block)) for block in (1, 3, 5, 7))] * 3


def test_a_copy_that_fails_leaves_no_half_filled_slot():
    fail = []

    def sources(block):
        if block in fail:
            raise RuntimeError("out of pinned memory")
        return pieces(block)

    stream = Stream(InPlaceCopies(), torch.device("cpu"), 8, [0, 1, 2], 1, sources)
    with stream.present(0):
        pass
    fail.append(2)
    with pytest.raises(RuntimeError, match="pinned"), stream.present(1):
        pass
    fail.clear()
    with stream.present(2) as slot:
        assert torch.equal(stream.slots[slot][:5], bytes_of(2))


@given(
    sizes=st.lists(st.floats(1, 10), min_size=2, max_size=12),
    seconds=st.floats(0.1, 5),
    bandwidth=st.floats(0.5, 20),
    ahead=st.integers(0, 4),
    data=st.data(),
)
def test_a_predicted_step_lies_between_the_limits(sizes, seconds, bandwidth, ahead, data):
    blocks = range(len(sizes))
    streamed = sorted(data.draw(st.sets(st.sampled_from(list(blocks)), min_size=1)))
    step = predict(sizes, [seconds] * len(sizes), bandwidth, streamed, ahead, steps=6)
    compute = seconds * len(sizes)
    bus = sum(sizes[block] for block in streamed) / bandwidth
    if len(streamed) > ahead + 1:
        assert max(compute, bus) - 1e-6 <= step <= compute + bus + 1e-6
    else:
        assert step == pytest.approx(compute), "all of them stay in their slots"
    if ahead == 0 and len(streamed) == len(sizes):
        assert step == pytest.approx(compute + bus), "one slot, either filled or computed with"


def test_prefetch_hides_the_bus_behind_the_compute_and_spreading_hides_more():
    sizes, seconds = [1.0] * 40, [1.0] * 40
    half = {order: sorted(set(range(40)) - resident_blocks(sizes, 20, order)) for order in ORDERS}
    assert predict(sizes, seconds, 1.0, range(40), 0) == pytest.approx(80)
    assert predict(sizes, seconds, 1.0, range(40), 1, steps=6) == pytest.approx(40)
    assert predict(sizes, seconds, 1.0, half["spread"], 1) == pytest.approx(40)
    assert predict(sizes, seconds, 0.5, half["spread"], 1, steps=6) == pytest.approx(40)
    assert predict(sizes, seconds, 0.5, half["first"], 1, steps=6) > 55
