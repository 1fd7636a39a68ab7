"""The repository's own rules: linters, types, metadata."""

import ast
import importlib.util
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

CONFIG = ROOT / "pyproject.toml"
PACKAGES = ("hotpath", "host", "nodes", "devtools", "benchmarks")


def checked(*command, cwd=ROOT):
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    checked("ruff", "check", "--no-cache", ".")
    checked("ruff", "format", "--no-cache", "--check", ".")


def test_mypy(tmp_path):
    # A checkout's folder may have any name, and mypy wants a package's.
    (tmp_path / "hotpath_pack").symlink_to(ROOT, target_is_directory=True)
    packages = [argument for name in PACKAGES for argument in ("-p", f"hotpath_pack.{name}")]
    checked("mypy", "--config-file", str(CONFIG), "--cache-dir", str(tmp_path / "cache"), *packages, cwd=tmp_path)


def imports(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [("." * node.level) + (node.module or "")]
            yield from ((path.relative_to(ROOT / folder), name) for name in names)


def test_the_engine_imports_nothing_of_the_host():
    allowed = {*sys.stdlib_module_names, "torch", "triton", "psutil", "greenlet"}
    foreign = [
        (file, name) for file, name in imports("hotpath") if name[0] != "." and name.split(".")[0] not in allowed
    ]
    assert foreign == []
    levels = ((file, len(name) - len(name.lstrip("."))) for file, name in imports("hotpath"))
    assert [file for file, level in levels if level > len(file.parts)] == [], "out of the engine"


def test_only_the_host_room_and_node_schemas_know_comfyui():
    known = {name for _, name in imports("nodes") if name.startswith(("comfy", "server", "folder_paths"))}
    assert known <= {"comfy_api.latest", "comfy.model_patcher"}


def test_what_a_region_is_traced_through_reads_no_mapping_of_its_module():
    """On the order of its keys a graph guards by the module's name, which is another in another folder: not kept."""
    for path in (ROOT / "host" / "families").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        made = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
        mappings = {target.id for node in made for target in node.targets if isinstance(target, ast.Name)}
        binds = [
            node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith(("bind", "_"))
        ]
        read = {node.id for bind in binds for node in ast.walk(bind) if isinstance(node, ast.Name)}
        assert not mappings & read, path


def test_no_file_is_too_long_to_read_at_once():
    paths = [ROOT / "dev.py", *(path for name in (*PACKAGES, "tests") for path in (ROOT / name).rglob("*.py"))]
    assert [str(path) for path in paths if path.read_text(encoding="utf-8").count("\n") > 400] == []


def test_tests_of_the_host_are_in_its_rooms_and_each_file_has_a_name_of_its_own():
    rooms = [{path.parent.name for path in (ROOT / top).glob("*/*.py")} for top in ("host", "tests/host")]
    assert rooms[1] <= rooms[0]
    # pytest imports them by that name alone.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_requirements_list_no_torch():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.match(r"torch", line.strip())]


def test_diffusers_is_imported_by_what_needs_it_when_it_does():
    """At the top of a file it would be needed to load the pack."""
    imported = re.compile(r"^(import|from) diffusers\b", re.MULTILINE)
    for folder in ("host", "nodes", "hotpath"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not imported.search(path.read_text(encoding="utf-8")), path
    oldest = re.search(
        r'OLDEST_DIFFUSERS = "([\d.]+)"',
        (ROOT / "host" / "diffusers_folders" / "format.py").read_text(encoding="utf-8"),
    )
    requirement = f"diffusers>={oldest[1]}"
    assert requirement in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert f'dependencies = ["{requirement}", ' in CONFIG.read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("tomllib") is None, reason="tomllib came with Python 3.11")
def test_metadata_for_the_registry():
    import tomllib

    metadata = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    comfy = metadata["tool"]["comfy"]
    oldest = re.search(r'OLDEST_HOST = "(\d+\.\d+\.\d+)"', (ROOT / "host" / "__init__.py").read_text(encoding="utf-8"))
    assert oldest and comfy["requires-comfyui"] == f">={oldest[1]}"
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert "web" not in comfy
    files = metadata["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    # The registry takes an icon of up to 800x400, and shows a banner of 21:9.
    for url, size in ((comfy["Icon"], (400, 400)), (comfy["Banner"], (1344, 576))):
        picture = ROOT / url.removeprefix(files)
        assert size == struct.unpack(">II", picture.read_bytes()[16:24])
        assert picture.with_suffix(".svg").is_file() and picture.stat().st_size < 200_000
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["project"]["version"])
    assert metadata["project"]["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# Between a process and the helper that it started, through a pipe that nobody else has.
PIPES = ("behind.py", "helper.py")
# What keeps compiled blocks, below the user's and the output folder, by names that no client chooses; and what reads
# folders that are looked up in a list, whose index names no file outside.
OPEN_FILES = {"artifacts.py", "environment.py", "kept.py", "load.py", "turns.py"}


def test_the_pack_only_reads_over_http_and_opens_few_files_itself():
    """What a client of the host could reach: no route that changes state, no file name that is opened."""
    for folder in ("host", "nodes", "hotpath"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"routes\.(?!get\b)\w+", text), path
            assert path.name in PIPES or not re.search(r"\btorch\.load\(|\bpickle\b", text), path
            if path.name not in OPEN_FILES:
                assert not re.search(r"\bopen\(|\bread_(text|bytes)\(|\bwrite_(text|bytes)\(", text), path


def test_every_node_has_a_literal_id_with_our_prefix_and_a_help_page():
    for path in (ROOT / "nodes").glob("[!_]*.py"):
        text = path.read_text(encoding="utf-8")
        ids = re.findall(r'node_id="(\w+)"', text)
        assert ids and "(io.ComfyNode)" in text
        for node_id in ids:
            assert node_id.startswith("HotPath")
            assert (ROOT / "js" / "docs" / f"{node_id}.md").is_file()
