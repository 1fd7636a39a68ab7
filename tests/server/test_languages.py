"""What the host gives its page of our languages, beside what it says of the nodes."""

import json
import os
import re
from pathlib import Path

import pytest
import requests
from hotpath_pack.devtools.locales import LOCALES, NODE_DEFS, node_defs
from hotpath_pack.devtools.server import ROOT, HostServer

LANGUAGES = ("en", "zh", "ja", "fr")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HostServer(Path(os.environ["COMFYUI_PATH"]), base=tmp_path_factory.mktemp("host")) as server:
        yield server


def test_the_english_texts_are_those_of_the_nodes(server):
    """``python -m devtools.locales`` remakes them."""
    assert json.loads((LOCALES / "en" / NODE_DEFS).read_text(encoding="utf-8")) == node_defs(server.get("/object_info"))


def test_the_host_serves_the_translations(server):
    served = server.get("/i18n")
    for language in LANGUAGES:
        for path in (LOCALES / language).iterdir():
            ours = json.loads(path.read_text(encoding="utf-8"))
            given = served[language] if path.stem == "main" else served[language][path.stem]
            assert {key: given[key] for key in ours} == ours


def test_the_host_serves_the_help_pages(server):
    """Where its page looks for them: for English it falls back on the one that is in no language's folder."""
    docs = f"{server.url}/extensions/HotPath/docs"
    for node_id in node_defs(server.get("/object_info")):
        for name in (f"{node_id}.md", *(f"{node_id}/{language}.md" for language in LANGUAGES[1:])):
            answer = requests.get(f"{docs}/{name}", timeout=10)
            assert answer.status_code == 200 and "html" not in answer.headers["content-type"]
            assert answer.content == (ROOT / "js" / "docs" / name).read_bytes()


def test_values_to_choose_from_are_not_translated(server):
    info, served = server.get("/object_info"), server.get("/i18n")
    named = 0
    for node_id, node in node_defs(info).items():
        inputs = {**info[node_id]["input"].get("required", {}), **info[node_id]["input"].get("optional", {})}
        for name, (_, options) in inputs.items():
            for value in map(str, options.get("options", ())):
                if re.search(rf"\b{re.escape(value)}\b", node["inputs"][name]["tooltip"]):
                    named += 1
                    for language in LANGUAGES:
                        assert value in served[language]["nodeDefs"][node_id]["inputs"][name]["tooltip"]
    assert named > 10
