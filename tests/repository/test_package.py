"""dev.py package: the registry's own tools take the pack, and pack all of it and nothing else."""

import os
import sys
import zipfile
from pathlib import Path

import pytest
from hotpath_pack import dev
from hotpath_pack.devtools import environments
from hotpath_pack.devtools.server import PACK

CACHE = environments.cache_folder(os.environ, sys.platform, Path.home())
TOLD = {"CHANGELOG.md", "LICENSE", "README.md", "requirements.txt"}


def test_the_archive_has_all_of_the_pack_and_nothing_else(packed):
    with zipfile.ZipFile(packed) as archive:
        names = {name.partition("/")[0] for name in archive.namelist()}
    assert names == {name for name in PACK if (dev.ROOT / name).exists()} | TOLD


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("pyproject.toml", 'classifiers = ["Operating System :: Linux"]', "Invalid Operating System classifier"),
        ("pyproject.toml", '[tool.comfy]\nrequires-comfyui = ">=0.24"', "Invalid requires-comfyui format"),
        ("node.py", 'exec("1")', "Use of `exec` detected"),
        ("node.py", "# \u2248", "can't encode on Windows"),
        ("web/panel.js", "window.panel = {};", "global-write"),
    ],
)
def test_what_the_registry_would_drop_or_refuse_is_an_error(tmp_path, monkeypatch, file, content, said):
    (tmp_path / "web").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.0.0"\nlicense = "MIT"\n')
    with (tmp_path / file).open("a", encoding="utf-8") as wrong:
        wrong.write(f"{content}\n")
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    with pytest.raises(environments.SetupError, match=said):
        dev.package(CACHE)
    assert not (tmp_path / "node.zip").exists()
