"""A real ComfyUI without a screen: started with only this pack, driven over HTTP and its websocket, always ended."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import requests
import torch
from safetensors.torch import load_file
from torch import Tensor

from .workflows import Workflow

ROOT = Path(__file__).resolve().parent.parent
PACK = ("__init__.py", "host", "hotpath", "nodes", "js", "locales", "example_workflows", "subgraphs", "pyproject.toml")
HOST_NODES = ROOT / "devtools" / "host_nodes"
SUPERVISED = ROOT / "devtools" / "supervised.py"
# The event in which a node of the pack tells its status.
STATUS = "hotpath.status"
_TAIL_LINES = 40


class HostFailed(RuntimeError):
    """The host did not start, lost the pack or went away; the message ends with the tail of its log."""


class PromptFailed(RuntimeError):
    """A prompt was refused or a node of it raised. ``type`` is the exception's or the refusal's type."""

    def __init__(self, node_id: str | None, type: str, message: str) -> None:
        super().__init__(f"{node_id or 'prompt'}: {type}: {message}")
        self.node_id = node_id
        self.type = type
        self.message = message


class PromptInterrupted(RuntimeError):
    """A prompt was interrupted before it ended."""


@dataclass(frozen=True)
class Event:
    """A websocket message."""

    time: float
    type: str
    data: Mapping[str, Any]


@dataclass
class Result:
    """A finished prompt: its history entry and what the websocket said meanwhile."""

    prompt_id: str
    history: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @property
    def texts(self) -> list[tuple[str, str]]:
        """(node id, text) for each new text that a node showed, in order."""
        shown: dict[str, str] = {}
        texts = []
        for event in self.events:
            if event.type == STATUS and shown.get(event.data["node"]) != event.data["text"]:
                shown[event.data["node"]] = event.data["text"]
                texts.append((event.data["node"], event.data["text"]))
        return texts

    def seconds(self, node_id: str) -> float:
        """How long a node executed.

        Raises:
            LookupError: it did not, because its output was cached.
        """
        executing = [event for event in self.events if event.type == "executing"]
        for event, following in pairwise(executing):
            if event.data["node"] == node_id:
                return following.time - event.time
        raise LookupError(f"node {node_id} did not execute")


def cpu_flags() -> list[str]:
    """What the host needs on a machine without CUDA: its default attention for CPU breaks graphs."""
    return [] if torch.cuda.is_available() else ["--cpu", "--use-pytorch-cross-attention"]


class HostServer:
    """ComfyUI with only this pack and the development nodes, on a free port, from ``start`` to ``stop``.

    The pack is copied, so that it runs under the folder name that users have, or unpacked from an archive.

    Args:
        comfyui: folder of the host's main.py.
        base: folder for models, output and log, kept after; a temporary one by default.
        flags: further command line arguments; with None those of ``cpu_flags``.
        env: environment variables on top of the current ones.
        model_folders: folders to look for diffusion models in, beside ``diffusion_models``.
        archive: a packed pack to install, in a folder of the archive's name, rather than copy this one.
        port: 0 chooses a free one.
        echo: print the host's output rather than log it.
    """

    def __init__(
        self,
        comfyui: Path,
        *,
        base: Path | None = None,
        flags: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        model_folders: Sequence[Path] = (),
        archive: Path | None = None,
        port: int = 0,
        echo: bool = False,
    ) -> None:
        self.comfyui = Path(comfyui)
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._temporary = None
        if base is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="hotpath-", ignore_cleanup_errors=True)
            base = Path(self._temporary.name)
        self.base = base.resolve()
        self.log = self.base / "host.log"
        self._flags = cpu_flags() if flags is None else list(flags)
        self.env = dict(env or {})
        self._model_folders = model_folders
        self._archive = archive
        self.pack = self.base / "custom_nodes" / (archive.stem if archive else "HotPath")
        self._echo = echo
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The host's process; None while it does not run."""
        return None if self._process is None else self._process.pid

    @property
    def diffusion_models(self) -> Path:
        return self.base / "models" / "diffusion_models"

    @property
    def loras(self) -> Path:
        return self.base / "models" / "loras"

    def __enter__(self) -> HostServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, timeout: float = 180) -> None:
        """Start the host and wait until it answers.

        Raises:
            HostFailed: it ended, did not answer in time, or could not import the pack.
        """
        atexit.register(self.stop)
        try:
            self._prepare()
            self._process = self._launch()
            self._wait_until_ready(self._process, timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the host and its children, and remove a temporary base folder. May be called again."""
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is not None:
            with process:
                self._signal(process, "SIGTERM")
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    self._signal(process, "SIGKILL")
        if self._temporary is not None:
            self._temporary.cleanup()

    def wait(self) -> int:
        """Wait until the host ends by itself; returns its exit status."""
        return 0 if self._process is None else self._process.wait()

    def post(self, workflow: Workflow, client_id: str | None = None) -> str:
        """Queue a workflow; returns its prompt id.

        Raises:
            PromptFailed: the host refused it.
        """
        payload: Any = {"prompt": workflow, "client_id": client_id or uuid.uuid4().hex}
        response = requests.post(f"{self.url}/prompt", json=payload, timeout=60)
        body = response.json()
        if response.status_code == 200 and not body["node_errors"]:
            return body["prompt_id"]
        for node_id, node in body["node_errors"].items():
            for error in node["errors"]:
                raise PromptFailed(node_id, error["type"], f"{error['message']}: {error['details']}")
        raise PromptFailed(None, body["error"]["type"], body["error"]["message"])

    def run(self, workflow: Workflow, on_event: Callable[[Event], None] | None = None, timeout: float = 600) -> Result:
        """Queue a workflow and follow it on the websocket until it ends.

        Raises:
            PromptFailed: the host refused it, or a node raised.
            PromptInterrupted: it was interrupted.
            HostFailed: the host went away.
            TimeoutError: it took longer than ``timeout`` seconds.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._follow(workflow, on_event), timeout))
        except asyncio.TimeoutError:
            raise TimeoutError(f"the prompt did not end within {timeout:.0f} s") from None
        except (aiohttp.ClientError, requests.ConnectionError) as error:
            raise self._failed(f"The host went away ({type(error).__name__}).") from error

    def report(self) -> dict[str, Any]:
        """The pack's own account: GET /hotpath/report."""
        return self.get("/hotpath/report")

    def get(self, path: str) -> Any:
        """JSON of a GET request."""
        response = requests.get(self.url + path, timeout=60)
        response.raise_for_status()
        return response.json()

    def set_settings(self, settings: Mapping[str, Any]) -> None:
        """Settings of the browser's user, which a page reads when it loads."""
        requests.post(f"{self.url}/settings", json=dict(settings), timeout=60).raise_for_status()

    def latent(self, result: Result, node_id: str = "save") -> Tensor:
        """What a SaveLatent node saved."""
        return load_file(self.latent_file(result, node_id))["latent_tensor"]

    def latent_file(self, result: Result, node_id: str = "save") -> Path:
        saved = result.history["outputs"][node_id]["latents"][0]
        return self.base / saved["type"] / saved["subfolder"] / saved["filename"]

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def free(self) -> None:
        """Unload all models and drop cached outputs."""
        self._command("/free", {"unload_models": True, "free_memory": True})

    def models_left(self, timeout: float = 30) -> int:
        """How many models are in memory once the host, which unloads when it is idle, has had ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (count := self.get("/hotpath_dev/models")) and time.monotonic() < deadline:
            time.sleep(0.5)
        return count

    def interrupt(self) -> None:
        """Interrupt the prompt that runs."""
        self._command("/interrupt", {})

    def _command(self, path: str, payload: Any) -> None:
        requests.post(self.url + path, json=payload, timeout=60).raise_for_status()

    def _prepare(self) -> None:
        for folder in (self.diffusion_models, self.loras, self.base / "custom_nodes"):
            folder.mkdir(parents=True, exist_ok=True)
        for copied in (self.pack, self.pack.with_name(HOST_NODES.name)):
            shutil.rmtree(copied, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(HOST_NODES, self.pack.with_name(HOST_NODES.name), ignore=ignored)
        if self._archive is not None:
            shutil.unpack_archive(self._archive, self.pack)
        else:
            self._copy_pack(ignored)
        # The host reads YAML, and JSON is YAML.
        folders = "\n".join(str(folder.resolve()) for folder in self._model_folders)
        extra = {"hotpath": {"diffusion_models": folders}} if folders else {}
        (self.base / "extra_model_paths.yaml").write_text(json.dumps(extra), encoding="utf-8")

    def _copy_pack(self, ignored: Callable[[str, list[str]], set[str]]) -> None:
        self.pack.mkdir()
        for name in PACK:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.pack / name, ignore=ignored)
            elif source.exists():
                shutil.copy2(source, self.pack / name)

    def _launch(self) -> subprocess.Popen[bytes]:
        database = (self.base / "comfyui.db").as_posix()
        command = [sys.executable, str(SUPERVISED), str(self.comfyui / "main.py")]
        command += ["--base-directory", str(self.base), "--database-url", f"sqlite:///{database}"]
        command += ["--extra-model-paths-config", str(self.base / "extra_model_paths.yaml")]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", self.pack.name, HOST_NODES.name]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch", "--disable-api-nodes"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **offline, **self.env}
        output = None if self._echo else self.log.open("wb")
        try:
            return subprocess.Popen(
                [*command, *self._flags],
                cwd=self.base,
                env=env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=sys.platform != "win32",
            )
        finally:
            if output is not None:
                output.close()

    def _wait_until_ready(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            if process.poll() is not None:
                raise self._failed(f"The host ended with status {process.returncode} while it started.")
            with suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{self.url}/system_stats", timeout=5).ok:
                    break
            if time.monotonic() > deadline:
                raise self._failed(f"The host did not answer within {timeout:.0f} s.")
            time.sleep(0.1)
        if "(IMPORT FAILED)" in self.log_text():
            raise self._failed("The host could not import the pack.")

    async def _follow(self, workflow: Workflow, on_event: Callable[[Event], None] | None) -> Result:
        client_id = uuid.uuid4().hex
        failure: Exception | None = None
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client_id}", max_msg_size=0) as websocket,
        ):
            result = Result(await asyncio.to_thread(self.post, workflow, client_id))
            async for message in websocket:
                event = _event(message.type, message.data)
                if event is None or event.data.get("prompt_id", result.prompt_id) != result.prompt_id:
                    continue
                result.events.append(event)
                if on_event is not None:
                    on_event(event)
                if event.type == "execution_error":
                    data = event.data
                    failure = PromptFailed(data["node_id"], data["exception_type"], data["exception_message"].strip())
                elif event.type == "execution_interrupted":
                    failure = PromptInterrupted(result.prompt_id)
                elif event.type == "executing" and event.data["node"] is None:
                    break
            else:
                raise self._failed("The host closed the connection.")
        if failure is not None:
            raise failure
        result.history = self.get(f"/history/{result.prompt_id}")[result.prompt_id]
        return result

    def _failed(self, sentence: str) -> HostFailed:
        tail = "\n".join(self.log_text().splitlines()[-_TAIL_LINES:])
        return HostFailed(f"{sentence} The end of its log:\n{tail}" if tail else sentence)

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], name: str) -> None:
        """Signal the host and its children, such as compile workers."""
        if sys.platform == "win32":
            process.kill()
        else:
            # macOS refuses to signal a group of which only a zombie is left.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, getattr(signal, name))


def _event(kind: aiohttp.WSMsgType, data: Any) -> Event | None:
    """The event of a websocket message; None for previews and what else is not needed."""
    now = time.perf_counter()
    if kind is aiohttp.WSMsgType.TEXT:
        body = json.loads(data)
        return Event(now, body["type"], body["data"])
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
