"""dev.py: where it keeps things, what it refuses, and that half-made environments are never used."""

import ast
import dataclasses
import errno
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
dev = importlib.util.module_from_spec(spec)
sys.modules["dev"] = dev
spec.loader.exec_module(dev)
HOST = dev.HOSTS[0]


@pytest.mark.parametrize(
    "environ, system, folder",
    [
        ({}, "linux", "/home/me/.cache/hotpath"),
        ({"XDG_CACHE_HOME": "/xdg"}, "linux", "/xdg/hotpath"),
        ({}, "darwin", "/home/me/Library/Caches/hotpath"),
        ({"LOCALAPPDATA": "/local"}, "win32", "/local/hotpath/Cache"),
        ({"HOTPATH_CACHE": "/mine", "XDG_CACHE_HOME": "/xdg"}, "linux", "/mine"),
    ],
)
def test_the_cache_folder_follows_the_system(environ, system, folder):
    assert dev.cache_folder(environ, system, Path("/home/me")) == Path(folder)


def test_the_environment_is_keyed_by_what_it_is_built_from(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("pytest==1\n")
    host = dataclasses.replace(HOST, requirements=(requirements,))
    key = dev.environment_key(host)
    assert dev.environment_key(host) == key
    requirements.write_text("pytest==2\n")
    changed = dev.environment_key(host)
    pins = dev.environment_key(dataclasses.replace(host, packages=("torch==2.12.0",)))
    archive = dev.environment_key(dataclasses.replace(host, archive=dev.HOSTS[1].archive))
    over = dev.environment_key(dataclasses.replace(host, over=("comfy-kitchen==0.2.40",)))
    assert len({key, changed, pins, archive, over}) == 5


def archive(path, **files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_only_the_regular_files_of_the_host_are_unpacked(tmp_path):
    source = archive(tmp_path / "a.tar.gz", p__vendor__ComfyUI__main=b"1", p__other=b"2", p__vendor__ComfyUI__link=None)
    dev.unpack(source, ("vendor", "ComfyUI"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["main"]


def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path):
    source = archive(tmp_path / "a.tar.gz", **{"p__vendor__ComfyUI__..__..__evil": b"1"})
    with pytest.raises(dev.SetupError, match="leads out of its folder"):
        dev.unpack(source, ("vendor", "ComfyUI"), tmp_path / "out" / "ComfyUI")
    assert not list(tmp_path.rglob("evil"))


def test_an_archive_without_the_host_is_named(tmp_path):
    with pytest.raises(dev.SetupError, match="holds no vendor/ComfyUI"):
        dev.unpack(archive(tmp_path / "a.tar.gz", p__x=b"1"), ("vendor", "ComfyUI"), tmp_path / "out")


def test_a_wrong_checksum_is_refused(tmp_path):
    with pytest.raises(dev.SetupError, match="wrong checksum, so it was not unpacked"):
        dev.verify(archive(tmp_path / "a.tar.gz", p__x=b"1"), HOST.sha256)


def test_a_complete_environment_is_used_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "build", lambda *args: pytest.fail("built again"))
    folder = tmp_path / dev.environment_key(HOST)
    folder.mkdir()
    (folder / "complete").touch()
    assert dev.own_environment(tmp_path, HOST).comfyui == folder / "ComfyUI"


def test_an_interrupted_set_up_is_redone(tmp_path, monkeypatch):
    folder = tmp_path / dev.environment_key(HOST)
    folder.mkdir()
    (folder / "half").touch()
    monkeypatch.setattr(dev, "_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dev.own_environment(tmp_path, HOST)
    assert not (folder / "half").exists()
    assert not (folder / "complete").exists()


def test_a_lock_is_held_against_another_process(tmp_path):
    lock = tmp_path / "lock"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dev; from pathlib import Path\n"
        f"file = Path({str(lock)!r}).open('ab'); sys.exit(0 if dev._try_lock(file) else 3)"
    )
    with dev.locked(lock):
        assert subprocess.call([sys.executable, "-c", code]) == 3
    assert subprocess.call([sys.executable, "-c", code]) == 0


def test_too_little_space_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(dev.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**8))
    monkeypatch.setattr(dev, "_step", lambda *args: pytest.fail("went on"))
    for setup, needed in ((HOST, "10 GB"), (dev.TOOLS, "0.8 GB")):
        with pytest.raises(dev.SetupError, match=f"needs about {needed} and .* has 0.1 GB"):
            dev.own_environment(tmp_path, setup)


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dev, "build", full)
    with pytest.raises(dev.SetupError, match="is full. Free some, or set HOTPATH_CACHE"):
        dev.find_environment({}, tmp_path, HOST)


def test_a_failed_step_names_its_log(tmp_path):
    log = tmp_path / "log"
    failing = [sys.executable, "-c", "print('ERROR: no such host'); raise SystemExit(1)"]
    with log.open("ab") as lock, pytest.raises(dev.SetupError) as failed:
        dev._step("Downloading", failing, log, lock, os.environ)
    assert str(failed.value).startswith("Downloading failed (ERROR: no such host). Is there a network?")
    assert str(log) in str(failed.value)


def test_the_matrix_runs_each_setup_and_keeps_only_what_was_there(tmp_path, monkeypatch, capsys):
    def make(environment, setup, folder, log, lock):
        environment.python.parent.mkdir(parents=True)
        made.append(setup.name)

    def call(line, env):
        ran.append((env["COMFYUI_PATH"], line[-1]))
        return 1 if line[5].endswith("engine") else 0

    made, ran = [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dev, "build", make)
    monkeypatch.setattr(dev.subprocess, "call", call)
    kept = tmp_path / dev.environment_key(HOST)
    kept.mkdir()
    (kept / "complete").touch()
    assert dev.run_matrix(["-q"], tmp_path) == 1
    setups = dev.MATRIX
    assert made == [setup.name for setup in setups[1:]]
    assert ran[0] == (str(kept / "ComfyUI"), "-q") and len(ran) == len(setups)
    assert [path.parent for path in tmp_path.glob("*/")] == [tmp_path] and kept.exists()
    lines = capsys.readouterr().out.splitlines()[-len(setups) :]
    assert [line.rsplit("  ", 1)[-1].strip() for line in lines] == ["passed"] * 6 + ["FAILED (status 1)"] * 7
    assert "refuses to load" in lines[4]


def test_the_oldest_host_that_is_not_refused_is_the_one_that_the_pack_names():
    text = (ROOT / "host" / "__init__.py").read_text(encoding="utf-8")
    assert f'OLDEST_HOST = "{[setup.name for setup in dev.HOSTS if setup.tests is not dev.REFUSED][-1]}"' in text
    assert f'OLDEST_TORCH = "{dev.ENGINES[-1].name.removeprefix("torch ")}"' in text


def test_an_existing_comfyui_is_checked(tmp_path):
    with pytest.raises(dev.SetupError, match="has no main.py"):
        dev.find_environment({"COMFYUI_PATH": str(tmp_path)}, tmp_path, HOST)
    (tmp_path / "main.py").touch()
    python = dev.venv_python(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    found = dev.find_environment({"COMFYUI_PATH": str(tmp_path)}, tmp_path, HOST)
    assert (found.python, found.comfyui, found.ours) == (python, tmp_path, False)


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
    environment = dev.Environment(Path(sys.executable), tmp_path, ours=False)
    ran = []
    monkeypatch.setattr(dev, "existing_environment", lambda folder: environment if folder == tmp_path else None)
    monkeypatch.setattr(dev, "check_test_modules", lambda python: None)
    monkeypatch.setattr(dev.subprocess, "call", lambda line, env: ran.append((line[4:], env["COMFYUI_PATH"])))
    monkeypatch.setattr(dev, "run", lambda command, arguments, found, cache: ran.append((command, arguments, found)))
    dev.main(["test", "-q", "--host", str(tmp_path), "-k", "flux"])
    assert ran == [(["devtools.canary"], str(tmp_path)), ("test", ["-q", "-k", "flux"], environment)]


def test_an_old_python_gets_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert dev.main(["demo"]) == 1
    assert "dev.py needs Python 3.10 to 3.13" in capsys.readouterr().err


def test_an_old_python_can_read_it():
    ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"), feature_version=(3, 8))
