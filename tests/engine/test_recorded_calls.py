"""Recordings over the calls of a model: threads that make them, and inputs that all blocks of a call share."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from hotpath_pack.hotpath.first_run import waiting_for_others
from hotpath_pack.hotpath.internals.memory import storage_at
from hotpath_pack.hotpath.values import lying_in
from recorded_blocks import Block, Graph, make_inputs, plain, step


def test_a_thread_has_run_a_graph_before_it_records_one_as_libraries_plan_for_each_thread(recordings, recorder):
    planned = threading.local()

    class Planning(Graph):
        def __call__(self, weights, inputs):
            planned.here = True
            return super().__call__(weights, inputs)

    def plans_within_recording(number):
        assert hasattr(planned, "here"), "a plan would be made within a recording"

    graph, blocks, reasons = Planning(), [Block(seed) for seed in range(3)], []
    recorder.before_recording = plans_within_recording
    want = [plain(Graph(), blocks, make_inputs(call)) for call in range(2)]
    with ThreadPoolExecutor(1) as other:
        for run in (step, lambda *args, **kwargs: other.submit(step, *args, **kwargs).result()):
            for call in range(2):
                assert torch.equal(run(recordings, graph, blocks, make_inputs(call), reasons=reasons), want[call])
            recorder.grow()
    assert (recorder.recorded, recorder.alive, reasons) == (6, 3, [])


def test_inputs_that_all_blocks_share_are_brought_once_a_call_where_only_the_host_runs_between(recordings):
    graph, blocks = Graph(), [Block(seed) for seed in range(4)]
    for call in range(2):
        step(recordings, graph, blocks, make_inputs(call))

    def halved_after_two_blocks(inputs):
        def between(index, x):
            if index == 1:
                inputs["pe"].mul_(0.5)
            return x

        return between

    want, inputs = plain(graph, blocks, make_inputs(0)), make_inputs(0)
    with waiting_for_others():
        # The second block brings it once more, as what came first may be gone by then.
        got = step(recordings, graph, blocks, inputs, between=halved_after_two_blocks(inputs))
    assert torch.equal(got, want), "brought again though nobody may have written it"
    inputs = make_inputs(0)
    got = step(recordings, graph, blocks, inputs, between=halved_after_two_blocks(inputs))
    assert not torch.equal(got, want), "not brought again though anybody may have written it"


def test_what_a_recording_brought_is_not_taken_for_what_was_there_before(recordings):
    graph, block, other = Graph(), Block(0), Block(1)
    inputs, others = make_inputs(0), make_inputs(1)
    for _ in range(2):
        step(recordings, graph, [block], make_inputs(0))
        recordings.run(other, graph, {"w": other.weight}, others, False)

    def run(block, inputs):
        inputs = {**inputs, "x": make_inputs(0)["x"]}
        return recordings.run(block, graph, {"w": block.weight}, inputs, True).output["x"].clone()

    with waiting_for_others():
        first = [run(block, inputs) for _ in range(3)]
        # It is recorded only now, with another embedding.
        run(other, others)
        assert torch.equal(run(block, inputs), first[0]) and torch.equal(first[0], first[2])


def test_what_lies_where_a_shared_input_was_is_brought(recordings):
    graph, blocks = Graph(), [Block(seed) for seed in range(6)]
    for call in range(2):
        step(recordings, graph, blocks, make_inputs(call))
    memory = torch.empty(64, dtype=torch.uint8)
    with waiting_for_others():
        recordings.begin()
        inputs = make_inputs(0)
        other = plain(graph, blocks, make_inputs(0))
        x = inputs["x"]
        reference = make_inputs(0)["x"]
        for index, block in enumerate(blocks):
            pe = lying_in(storage_at(memory.data_ptr(), memory.device, 48), 0, (1, 3, 4), (12, 4, 1), torch.float32)
            pe.copy_(make_inputs(index)["pe"])
            done = recordings.run(block, graph, {"w": block.weight}, {**inputs, "x": x, "pe": pe}, True)
            x = done.output["x"]
            reference = graph({"w": block.weight}, {**make_inputs(0), "x": reference, "pe": pe})["x"]
            del pe
    assert torch.equal(x, reference) and not torch.equal(x, other)
