"""dev.py: what it takes and refuses, and that each command runs where it should."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hotpath_pack import dev
from hotpath_pack.devtools import environments

ROOT = Path(__file__).resolve().parent.parent.parent
HOST = environments.HOSTS[0]


def test_the_matrix_runs_each_setup_and_keeps_only_what_was_there(tmp_path, monkeypatch, capsys):
    def make(environment, setup, folder, log, lock):
        environment.python.parent.mkdir(parents=True)
        made.append(setup.name)

    def call(line, env):
        ran.append((env["COMFYUI_PATH"], line[-1]))
        return 1 if line[5].endswith("engine") else 0

    made, ran = [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environments, "build", make)
    monkeypatch.setattr(dev.subprocess, "call", call)
    kept = tmp_path / environments.environment_key(HOST)
    kept.mkdir()
    (kept / "complete").touch()
    assert dev.run_matrix(["-q"], tmp_path) == 1
    setups = environments.MATRIX
    assert made == [setup.name for setup in setups[1:]]
    assert ran[0] == (str(kept / "ComfyUI"), "-q") and len(ran) == len(setups)
    assert [path.parent for path in tmp_path.glob("*/")] == [tmp_path] and kept.exists()
    lines = capsys.readouterr().out.splitlines()[-len(setups) :]
    assert [line.rsplit("  ", 1)[-1].strip() for line in lines] == ["passed"] * 6 + ["FAILED (status 1)"] * 7
    assert "refuses to load" in lines[4]


def test_paths_given_to_the_tests_work_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("test_x.py").touch()
    assert dev.absolute("test_x.py::test_y") == f"{tmp_path / 'test_x.py'}::test_y"
    assert dev.absolute("-k") == "-k"
    assert dev.absolute("missing.py") == "missing.py"


def command_line(*arguments, **environ):
    env = {**os.environ, **environ}
    done = subprocess.run([sys.executable, str(ROOT / "dev.py"), *arguments], env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip()


def test_errors_are_one_sentence_and_a_status(tmp_path):
    status, text = command_line("demo", COMFYUI_PATH=str(tmp_path))
    assert status == 1 and text.startswith("COMFYUI_PATH is") and len(text.splitlines()) == 1
    assert command_line("dance")[0] == 2
    status, text = command_line("package", "--fast")
    assert status == 2 and "package takes no --fast" in text
    status, text = command_line("--host", "0.1.0", "demo")
    assert status == 2 and "invalid choice: '0.1.0'" in text
    status, text = command_line("test", "--host", "0.1.0")
    assert status == 2 and "invalid choice: '0.1.0'" in text and "or the folder of any" in text
    status, text = command_line("test", "-q", "--host", str(tmp_path))
    assert status == 2 and f"{tmp_path} has no main.py" in text
    status, text = command_line("demo", "--size", "100x100")
    assert status == 2 and "is not WxH in multiples of 16" in text
    status, text = command_line("demo", "--model", str(tmp_path / "none.safetensors"))
    assert status == 2 and "can't read" in text


def test_the_table_of_any_comfyui_comes_before_its_tests(tmp_path, monkeypatch):
    (tmp_path / "main.py").touch()
    environment = environments.Environment(Path(sys.executable), tmp_path, ours=False)
    ran = []
    monkeypatch.setattr(environments, "existing_environment", {tmp_path: environment}.get)
    monkeypatch.setattr(dev, "check_test_modules", lambda python: None)
    monkeypatch.setattr(dev.subprocess, "call", lambda line, env: ran.append((line[4:], env["COMFYUI_PATH"])))
    monkeypatch.setattr(dev, "run", lambda command, arguments, found, cache: ran.append((command, arguments, found)))
    dev.main(["test", "-q", "--host", str(tmp_path), "-k", "flux"])
    assert ran == [(["devtools.canary"], str(tmp_path)), ("test", ["-q", "-k", "flux"], environment)]


def test_an_old_python_gets_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert dev.main(["demo"]) == 1
    assert "dev.py needs Python 3.10 to 3.13" in capsys.readouterr().err


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        # Those of the pack are by the name of their folder.
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("file", ["dev.py", "devtools/__init__.py", "devtools/environments.py"])
def test_an_old_python_can_read_it(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))
    needed = {name for name in imported(tree) if name not in sys.stdlib_module_names}
    assert needed <= {"devtools"}
