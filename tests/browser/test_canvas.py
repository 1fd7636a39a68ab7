"""What a user sees on the canvas, in the classic one and in Nodes 2.0."""

import itertools
import re

import pytest
from hotpath_pack.devtools.workflows import sampling

# Another seed for each prompt, or the host would take the sampler's result from its cache.
SEEDS = itertools.count(1)


def workflow(live, **options):
    return sampling(
        live.checkpoint, live.flux, **{"width": 128, "height": 128, "steps": 2, "seed": next(SEEDS), **options}
    )


def compiled(live, backend="aot_eager", on_failure="eager", **options):
    return workflow(live, compiled={"backend": backend, "on_failure": on_failure, "cache": "off"}, **options)


def run(page, **values):
    """Queue once more with another seed and the ``values`` of nodes by id, and wait."""
    page.queue()
    page.wait_for_queue()


def test_from_the_search_box_to_compiled_and_over_a_reload(page, live):
    ids = page.load(workflow(live))
    node = page.add("Compile Repeated Blocks", (760, 500))
    assert page.reads("idle") == "○\nNot run yet"
    page.connect(ids["model"], 0, node, 0)
    page.connect(node, 0, ids["sampler"], 0)
    assert (page.origin(node), page.origin(ids["sampler"])) == (ids["model"], node)
    page.set(node, backend="hotpath_dev_slow", cache="off")
    page.watch(node)
    page.queue()
    text = page.reads("compiled")
    page.wait_for_queue()
    text = page.reads("compiled")
    assert re.search(r"2 double, 3 single", text) and re.search(r"Graphs\s+2", text), text
    assert re.search(r"Last step\s+\d", text) and "Gain" not in text, "no eager step was measured"
    compiling = [shown for state, shown in page.seen() if state == "compiling"]
    assert any(re.search(r"1 s\s+Region\s+double block \(1 of 2\)", shown) for shown in compiling), compiling
    assert any("single block (2 of 2)" in shown for shown in compiling)

    # Two at once: the second starts while the first one's numbers are shown.
    page.set(ids["sampler"], seed=next(SEEDS))
    page.queue()
    page.set(ids["sampler"], seed=next(SEEDS))
    page.queue()
    page.wait_for_queue()
    assert re.search(r"Graphs\s+2", page.reads("compiled"))
    text = page.reads("compiled")
    prompt = page.page.evaluate("window.app.graphToPrompt()")
    assert "hotpath_status" not in str(prompt["output"])

    page.page.wait_for_timeout(1000)
    page.open()
    assert page.reads("compiled") == text
