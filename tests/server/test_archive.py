"""The archive that the registry serves, installed in a folder of another name than ours."""

import shutil

import pytest
import requests
from hotpath_pack import dev
from live import TOLERANCE, serve

FOLDER = "comfyui-fast-flux-123"


@pytest.fixture(scope="module")
def installed(tmp_path_factory, packed):
    archive = shutil.copy(packed, packed.with_name(f"{FOLDER}.zip"))
    with serve(tmp_path_factory.mktemp("host"), 2, 3, archive=archive) as live:
        yield live


def test_it_has_all_nodes_their_help_and_the_panel(installed):
    shown = installed.server.get("/object_info").items()
    nodes = {name for name, node in shown if node["python_module"] == f"custom_nodes.{FOLDER}"}
    pages = {page.stem: page for page in (dev.ROOT / "js" / "docs").glob("HotPath*.md")}
    assert nodes == pages.keys()
    scripts = [path for path in installed.server.get("/extensions") if FOLDER in path]
    assert sorted(scripts) == [f"/extensions/{FOLDER}/{script}" for script in ("hotpath.js", "texts.js")]
    for path in (*scripts, *(f"/extensions/{FOLDER}/docs/{node}.md" for node in nodes)):
        served = requests.get(installed.server.url + path, timeout=60)
        assert served.content == (dev.ROOT / "js" / path.partition(f"{FOLDER}/")[2]).read_bytes()


def test_it_compiles(installed):
    assert installed.difference({"backend": "eager"}, steps=1) <= TOLERANCE
    assert installed.counts() == {"graphs": 2, "breaks": 0, "recompiles": 0}
