"""Recordings of blocks, on a recorder that reads and writes real addresses: whatever moves, the bits are those of the
graph itself."""

import gc

import pytest
import torch
from hotpath_pack.devtools.reruns import Reruns
from hotpath_pack.hotpath.cuda_graphs import Busy
from hotpath_pack.hotpath.recorded import DIFFERS, HELD, MOVED, NO_MEMORY, OTHER_KIND, Recordings
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_blocks import Block, Graph, make_inputs, plain, step


@pytest.mark.parametrize("new", [False, True], ids=["in place", "new output"])
@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference"])
def test_replayed_are_the_bits_of_the_graph(recordings, recorder, new, inference):
    graph, blocks = Graph(new), [Block(seed) for seed in range(4)]
    with torch.inference_mode(inference), torch.no_grad():
        for call in range(6):
            assert torch.equal(
                step(recordings, graph, blocks, make_inputs(call)), plain(graph, blocks, make_inputs(call))
            )
    # Of six calls the first is not recorded, and the second is.
    assert recorder.recorded == recordings.count == 4
    # The first recording runs once more, to be compared.
    assert recorder.replays == 5 * 4 + 1


def test_activations_are_shared_by_all_blocks_and_stay_where_they_are(recordings):
    graph = Graph()
    few, many = [Block(seed) for seed in range(2)], [Block(seed) for seed in range(20)]
    for _ in range(3):
        step(recordings, graph, few, make_inputs(0))
    kept = recordings.bytes - recordings.count
    places = set()
    for _ in range(3):
        step(recordings, graph, many, make_inputs(0), between=lambda index, x: places.add(x.data_ptr()) or x)
    assert recordings.bytes - recordings.count == kept
    inputs = make_inputs(0)
    step(recordings, graph, many, inputs, between=lambda index, x: places.add(x.data_ptr()) or x)
    assert recordings.count == 22


def test_an_input_from_elsewhere_is_written_over_as_the_block_does(recordings):
    graph, block = Graph(), Block(0)
    for call in range(3):
        inputs, same = make_inputs(call), make_inputs(call)
        step(recordings, graph, [block], inputs)
        plain(graph, [block], same)
        for name in ("x", "tally", "pe"):
            assert torch.equal(inputs[name], same[name])


def test_a_weight_written_in_place_is_read_at_the_next_replay_and_one_elsewhere_is_recorded_anew(recordings, recorder):
    graph, blocks = Graph(), [Block(seed) for seed in range(2)]
    for _ in range(2):
        step(recordings, graph, blocks, make_inputs(0))
    blocks[0].weight.mul_(1.5)
    assert torch.equal(step(recordings, graph, blocks, make_inputs(1)), plain(graph, blocks, make_inputs(1)))
    assert recorder.recorded == 2
    blocks[0].move()
    for call in range(3):
        assert torch.equal(step(recordings, graph, blocks, make_inputs(call)), plain(graph, blocks, make_inputs(call)))
    assert recorder.recorded == 3 and recorder.alive == recordings.count == 2


def test_weights_that_keep_moving_are_left_alone_until_it_is_tried_again(recordings, recorder):
    graph, block, reasons = Graph(), Block(0), []
    for call in range(8):
        block.move()
        assert torch.equal(
            step(recordings, graph, [block], make_inputs(call), reasons=reasons),
            plain(graph, [block], make_inputs(call)),
        )
    assert recorder.recorded == 0 and set(reasons) == {MOVED}
    recordings.retry()
    for call in range(3):
        step(recordings, graph, [block], make_inputs(call))
    assert recorder.recorded == 1


def test_an_output_that_someone_keeps_is_never_written_over(recordings, recorder):
    graph, blocks, reasons, kept = Graph(), [Block(seed) for seed in range(3)], [], []
    for call in range(3):
        step(recordings, graph, blocks, make_inputs(call))
    want = plain(graph, blocks, make_inputs(3))
    step(recordings, graph, blocks, make_inputs(3), between=lambda index, x: kept.append(x) or x)
    assert torch.equal(kept[-1], want)
    replays = recorder.replays
    # A view of it is enough.
    kept[:] = [kept[-1][:, 1:]]
    for call in range(4, 6):
        got = step(recordings, graph, blocks, make_inputs(call), reasons=reasons)
        assert torch.equal(got, plain(graph, blocks, make_inputs(call))) and torch.equal(kept[0], want[:, 1:])
    assert set(reasons) == {HELD} and recorder.replays == replays
    kept.clear()
    step(recordings, graph, blocks, make_inputs(6))
    assert recorder.replays == replays + 3


def test_a_view_of_the_output_as_the_next_input_is_copied_as_it_is(recordings):
    graph, blocks = Graph(), [Block(seed) for seed in range(2)]
    turned = lambda index, x: x.flip(1)  # noqa: E731
    for call in range(4):
        want = make_inputs(call)
        for index, block in enumerate(blocks):
            want = {**want, "x": turned(index, graph({"w": block.weight}, want)["x"])}
        assert torch.equal(step(recordings, graph, blocks, make_inputs(call), between=turned), want["x"])


def test_only_what_waits_for_python_is_recorded_unless_all_is_to_be(recordings, recorder):
    graph, blocks = Graph(), [Block(seed) for seed in range(6)]
    recorder.waits = False
    for _ in range(4):
        step(recordings, graph, blocks, make_inputs(0), always=False)
    assert recorder.recorded == 0
    recorder.waits = True
    for _ in range(4):
        step(recordings, graph, blocks, make_inputs(0), always=False)
    assert recorder.recorded == 6


def test_sizes_go_least_recently_used_first_with_their_recordings(recorder):
    recordings = Recordings(recorder, lambda size: True, capacity=2)
    graph, block = Graph(), Block(0)
    for tokens in (3, 5, 7, 7, 3):
        for _ in range(3):
            inputs = make_inputs(0, tokens)
            assert torch.equal(step(recordings, graph, [block], inputs), plain(graph, [block], make_inputs(0, tokens)))
            assert recorder.alive == recordings.count <= 2
    # 3 was gone when it came again.
    assert recorder.recorded == 4
    recordings.drop()
    assert recorder.alive == recordings.count == recordings.bytes == 0


def test_recordings_go_with_their_block(recordings, recorder):
    graph, blocks = Graph(), [Block(seed) for seed in range(2)]
    for _ in range(2):
        step(recordings, graph, blocks, make_inputs(0))
    del blocks[1]
    gc.collect()
    assert recorder.alive == recordings.count == 1


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize(
    "error, why_not",
    [
        (torch.OutOfMemoryError, NO_MEMORY),
        (RuntimeError, "it can't be recorded (not permitted while capturing)"),
        (Busy, None),
    ],
)
@pytest.mark.parametrize("at", range(3))
def test_what_fails_while_recording_runs_as_ever(recordings, recorder, error, why_not, at):
    graph, blocks, reasons = Graph(), [Block(seed) for seed in range(3)], []

    def fail(number):
        if number == at:
            raise error("not permitted while capturing\nand more")

    recorder.before_recording = fail
    for call in range(5):
        got = step(recordings, graph, blocks, make_inputs(call), reasons=reasons)
        assert torch.equal(got, plain(graph, blocks, make_inputs(call)))
    if why_not is None:
        assert recordings.count == 3 and not reasons
    else:
        assert recordings.count == recorder.alive == 0 and set(reasons) == {why_not}
    recorder.before_recording = lambda number: None
    recordings.retry()
    for call in range(3):
        step(recordings, graph, blocks, make_inputs(call))
    assert recordings.count == (0 if why_not and why_not != NO_MEMORY else 3)


def test_an_interrupt_in_a_recording_comes_through_and_leaves_nothing_half_done(recordings, recorder):
    graph, blocks = Graph(), [Block(seed) for seed in range(3)]
    step(recordings, graph, blocks, make_inputs(0))

    def interrupt(number):
        if number == 1:
            raise Interrupted

    recorder.before_recording = interrupt
    with pytest.raises(Interrupted):
        step(recordings, graph, blocks, make_inputs(1))
    assert recorder.alive == recordings.count == 1
    for call in range(3):
        got = step(recordings, graph, blocks, make_inputs(call))
        assert torch.equal(got, plain(graph, blocks, make_inputs(call)))
    assert recordings.count == 3


def test_a_recording_that_computes_something_else_is_never_used(recordings, recorder, caplog):
    graph, blocks, reasons = Graph(), [Block(seed) for seed in range(3)], []
    # As if a kernel had been launched beside the recording.
    recorder.before_replay = lambda number: blocks[0].weight.mul_(2)
    recorder.after_replay = lambda number: blocks[0].weight.div_(2)
    want = plain(graph, [Block(seed) for seed in range(3)], make_inputs(0))
    step(recordings, graph, blocks, make_inputs(0))
    assert torch.equal(step(recordings, graph, blocks, make_inputs(0), reasons=reasons), want)
    assert set(reasons) == {DIFFERS}
    assert DIFFERS in caplog.text and recordings.count == recorder.alive == 0 and recorder.recorded == 1


def test_memory_is_asked_for_before_and_guards_hold_for_inputs_that_stay(recorder):
    asked, graph, block, reasons = [], Graph(), Block(0), []
    recordings = Recordings(recorder, lambda size: asked.append(size))
    for _ in range(3):
        step(recordings, graph, [block], make_inputs(0), reasons=reasons)
    inputs = make_inputs(0)
    assert len(asked) == 1 and asked[0] > inputs["x"].nbytes and set(reasons) == {NO_MEMORY}
    recordings = Recordings(recorder, lambda size: True)
    graph.accepting = False
    reasons.clear()
    for _ in range(3):
        step(recordings, graph, [block], inputs, reasons=reasons)
    assert set(reasons) == {OTHER_KIND} and recorder.recorded == 0


def test_what_a_larger_recording_outgrew_is_made_anew_once_and_then_all_share(recordings, recorder):
    graph, blocks = Graph(), [Block(seed) for seed in range(3)]

    def four_calls():
        for call in range(4):
            got = step(recordings, graph, blocks, make_inputs(call))
            assert torch.equal(got, plain(graph, blocks, make_inputs(call)))

    four_calls()
    assert (recorder.recorded, recorder.alive, recorder.settled) == (3, 3, 1), "settled once, when all is recorded"
    recorder.grow()
    four_calls()
    assert (recorder.recorded, recorder.alive, recorder.settled) == (6, 3, 2)


def test_what_is_unsafe_is_not_recorded(recordings, recorder):
    graph, block = Graph(), Block(0)
    for _ in range(3):
        done = recordings.run(block, graph, {"w": block.weight}, make_inputs(0), True, lambda: "hooks")
    assert done == (None, "hooks") and recorder.recorded == 0


def test_another_stream_has_recordings_of_its_own(recordings, recorder):
    graph, block = Graph(), Block(0)
    for stream in (0, 1):
        recorder.current_stream = stream
        for _ in range(2):
            step(recordings, graph, [block], make_inputs(0))
    assert recorder.recorded == 2


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, 1), st.sampled_from([3, 5]), st.integers(0, 3)),
        st.tuples(st.just("move"), st.integers(0, 1), st.integers(0, 2)),
        st.tuples(st.just("patch"), st.integers(0, 1), st.integers(0, 2)),
        st.tuples(st.just("keep")),
        st.tuples(st.just("let go")),
        st.tuples(st.just("drop")),
        st.tuples(st.just("retry")),
    ),
    min_size=6,
    max_size=40,
)


@settings(max_examples=150)
@given(ACTIONS, st.booleans())
def test_whatever_happens_the_bits_are_those_of_the_graph(actions, new):
    """Two models of one structure in turns, at two sizes, weights moved and patched between, outputs kept."""
    recordings = Recordings(Reruns(), lambda size: True, capacity=3)
    graph = Graph(new)
    models = [[Block(10 * model + index) for index in range(3)] for model in range(2)]
    kept = []
    for action, *given_ in actions:
        if action == "step":
            model, tokens, seed = given_
            want = plain(graph, models[model], make_inputs(seed, tokens))
            last = []
            got = step(
                recordings,
                graph,
                models[model],
                make_inputs(seed, tokens),
                between=lambda _, x, t=last: t.append(x) or x,
            )
            assert torch.equal(got, want)
            latest = last[-1], want
            del last
        elif action == "move":
            models[given_[0]][given_[1]].move()
        elif action == "patch":
            models[given_[0]][given_[1]].weight.add_(0.125)
        elif action == "keep" and "latest" in locals():
            kept.append(latest)
        elif action == "let go":
            kept.clear()
        elif action == "drop":
            recordings.drop()
        elif action == "retry":
            recordings.retry()
        if action != "step" and "latest" in locals():
            del latest
        for output, want in kept:
            assert torch.equal(output, want)
