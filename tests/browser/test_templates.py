"""The example workflows and the blueprint as a user gets at them, in the classic canvas and in Nodes 2.0."""

import pytest
from hotpath_pack.devtools.examples import BLUEPRINT, save_stand_ins, twins
from hotpath_pack.devtools.workflows import sampling

COMPILE = "HotPathCompileRepeatedBlocks"
OFFLOAD = "HotPathOffloadRepeatedBlocks"
# What the template browser does once a card was clicked, which takes long to show its hundreds of cards.
OPEN = """
async name => {
    const served = await fetch(`/api/workflow_templates/HotPath/${name}.json`);
    await window.app.loadGraphData(await served.json(), true, true, name, { openSource: "template" });
}
"""
LOOK = """
async () => {
    const { graph } = window.app;
    const title = window.LiteGraph.NODE_TITLE_HEIGHT;
    const boxes = graph._nodes.map((node) => [node.pos[0], node.pos[1] - title, ...node.size, node.title]);
    const apart = ([x, y, width, height], [otherX, otherY, otherWidth, otherHeight]) =>
        x + width <= otherX || otherX + otherWidth <= x ||
        y + height + title <= otherY || otherY + otherHeight + title <= y;
    return {
        prompt: (await window.app.graphToPrompt()).output,
        unknown: graph._nodes.map((node) => node.type).filter((type) => !window.LiteGraph.registered_node_types[type]),
        overlapping: boxes.filter((box, index) => boxes.some((other, at) => at < index && !apart(box, other))),
        files: graph._nodes.flatMap((node) => node.properties.models ?? []).map((model) => model.name),
    };
}
"""


@pytest.mark.sweep(keep=["classic"])
def test_each_example_opens_as_its_twin(live, page):
    save_stand_ins(live.server)
    # Cards come in the order of the folder, and those out of sight have no thumbnail yet.
    first = live.server.get("/workflow_templates")["HotPath"][0]
    page.open_template(first)
    for name in sorted(twins(), key=lambda name: name != first):
        if name != first:
            page.page.evaluate(OPEN, name)
        shown = page.page.evaluate(LOOK)
        for node in shown["prompt"].values():
            del node["_meta"]
        assert shown["prompt"] == twins()[name]
        values = [str(value) for node in twins()[name].values() for value in node["inputs"].values()]
        assert set(shown["files"]) == {value for value in values if value.endswith(".safetensors")}
        assert (shown["unknown"], shown["overlapping"]) == ([], []), name


@pytest.mark.sweep(keep=["Nodes 2.0"])
def test_the_blueprint_from_the_search_box_to_compiled(live, page, request):
    # Another seed in each mode, or the host would take the sampler's result from its cache.
    ids = page.load(sampling(live.checkpoint, live.flux, width=128, height=128, steps=2, seed=len(request.node.name)))
    added = page.add(BLUEPRINT.stem, (800, 700))
    inner = page.page.evaluate(
        """([id, ids]) => {
            const graph = window.app.graph;
            const node = graph.getNodeById(id);
            node.widgets.find((widget) => widget.name === "8-bit weights").value = true;
            const inner = Object.fromEntries(node.subgraph._nodes.map((inner) => [inner.type, inner]));
            const compile = inner.HotPathCompileRepeatedBlocks.widgets;
            compile.find((widget) => widget.name === "backend").value = "aot_eager";
            compile.find((widget) => widget.name === "cache").value = "off";
            graph.getNodeById(ids.model).connect(0, node, 0);
            node.connect(0, graph.getNodeById(ids.sampler), 0);
            return Object.fromEntries(Object.keys(inner).map((type) => [type, `${node.id}:${inner[type].id}`]));
        }""",
        [added, ids],
    )
    page.queue()
    page.wait_for_queue()
    report = live.server.report()
    compiled = [model["compiled_blocks"] for model in report["models"] if model["node_id"] == inner[COMPILE]]
    assert compiled == [{"double": 2, "single": 3}]
    assert [made["node_id"] for made in report["modulation"] if made["vectors"]] == [inner[OFFLOAD]]
    assert report["quantized"][-1]["layers"]["layers in int8_dynamic"] == 22
