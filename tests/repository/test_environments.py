"""Where environments are kept, what they are made from, and that half-made ones are never used."""

import dataclasses
import errno
import io
import os
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
from hotpath_pack.devtools import environments

ROOT = Path(__file__).resolve().parent.parent.parent
HOST = environments.HOSTS[0]


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
    assert environments.cache_folder(environ, system, Path("/home/me")) == Path(folder)


def test_the_environment_is_keyed_by_what_it_is_built_from(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("pytest==1\n")
    host = dataclasses.replace(HOST, requirements=(requirements,))
    key = environments.environment_key(host)
    assert environments.environment_key(host) == key
    requirements.write_text("pytest==2\n")
    changed = environments.environment_key(host)
    pins = environments.environment_key(dataclasses.replace(host, packages=("torch==2.12.0",)))
    archive = environments.environment_key(dataclasses.replace(host, archive=environments.HOSTS[1].archive))
    over = environments.environment_key(dataclasses.replace(host, over=("comfy-kitchen==0.2.40",)))
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
    environments.unpack(source, ("vendor", "ComfyUI"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["main"]


def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path):
    source = archive(tmp_path / "a.tar.gz", **{"p__vendor__ComfyUI__..__..__evil": b"1"})
    with pytest.raises(environments.SetupError, match="leads out of its folder"):
        environments.unpack(source, ("vendor", "ComfyUI"), tmp_path / "out" / "ComfyUI")
    assert not list(tmp_path.rglob("evil"))


def test_an_archive_without_the_host_is_named(tmp_path):
    with pytest.raises(environments.SetupError, match="holds no vendor/ComfyUI"):
        environments.unpack(archive(tmp_path / "a.tar.gz", p__x=b"1"), ("vendor", "ComfyUI"), tmp_path / "out")


def test_a_wrong_checksum_is_refused(tmp_path):
    with pytest.raises(environments.SetupError, match="wrong checksum, so it was not unpacked"):
        environments.verify(archive(tmp_path / "a.tar.gz", p__x=b"1"), HOST.sha256)


def test_a_complete_environment_is_used_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "build", lambda *args: pytest.fail("built again"))
    folder = tmp_path / environments.environment_key(HOST)
    folder.mkdir()
    (folder / "complete").touch()
    assert environments.own_environment(tmp_path, HOST).comfyui == folder / "ComfyUI"


def test_an_interrupted_set_up_is_redone(tmp_path, monkeypatch):
    folder = tmp_path / environments.environment_key(HOST)
    folder.mkdir()
    (folder / "half").touch()
    monkeypatch.setattr(environments, "_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        environments.own_environment(tmp_path, HOST)
    assert not (folder / "half").exists()
    assert not (folder / "complete").exists()


def test_a_lock_is_held_against_another_process(tmp_path):
    lock = tmp_path / "lock"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from devtools import environments; from pathlib import Path\n"
        f"file = Path({str(lock)!r}).open('ab'); sys.exit(0 if environments._try_lock(file) else 3)"
    )
    with environments.locked(lock):
        assert subprocess.call([sys.executable, "-c", code]) == 3
    assert subprocess.call([sys.executable, "-c", code]) == 0


def test_too_little_space_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(environments.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**8))
    monkeypatch.setattr(environments, "_step", lambda *args: pytest.fail("went on"))
    for setup, needed in ((HOST, "10 GB"), (environments.TOOLS, "0.8 GB")):
        with pytest.raises(environments.SetupError, match=f"needs about {needed} and .* has 0.1 GB"):
            environments.own_environment(tmp_path, setup)


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(environments, "build", full)
    with pytest.raises(environments.SetupError, match="is full. Free some, or set HOTPATH_CACHE"):
        environments.find_environment({}, tmp_path, HOST)


def test_a_failed_step_names_its_log(tmp_path):
    log = tmp_path / "log"
    failing = [sys.executable, "-c", "print('ERROR: no such host'); raise SystemExit(1)"]
    with log.open("ab") as lock, pytest.raises(environments.SetupError) as failed:
        environments._step("Downloading", failing, log, lock, os.environ)
    assert str(failed.value).startswith("Downloading failed (ERROR: no such host). Is there a network?")
    assert str(log) in str(failed.value)


def test_the_oldest_host_that_is_not_refused_is_the_one_that_the_pack_names():
    text = (ROOT / "host" / "__init__.py").read_text(encoding="utf-8")
    served = [setup.name for setup in environments.HOSTS if setup.tests is not environments.REFUSED]
    assert f'OLDEST_HOST = "{served[-1]}"' in text
    assert f'OLDEST_TORCH = "{environments.ENGINES[-1].name.removeprefix("torch ")}"' in text


def test_an_existing_comfyui_is_checked(tmp_path):
    with pytest.raises(environments.SetupError, match="has no main.py"):
        environments.find_environment({"COMFYUI_PATH": str(tmp_path)}, tmp_path, HOST)
    (tmp_path / "main.py").touch()
    python = environments.venv_python(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    found = environments.find_environment({"COMFYUI_PATH": str(tmp_path)}, tmp_path, HOST)
    assert (found.python, found.comfyui, found.ours) == (python, tmp_path, False)
