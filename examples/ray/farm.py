"""Map prompts over ComfyUI workers on a Ray cluster, or on this machine.

    python farm.py --comfyui /opt/ComfyUI --workers 2 --gpus 1 --out results prompts/*.json

Each prompt is a workflow in API format. Each worker is a Ray actor with a ComfyUI of its own on a port of its own;
those of one machine share a user folder, in which HotPath keeps what it compiled, so that one compiles for all. A
worker that dies is replaced and its prompt run again. A prompt that ComfyUI refuses or that raises is told and not run
again.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

Workflow = Mapping[str, Any]
Files = dict[str, bytes]
"""What a prompt made, by file name."""

# Ends with whoever started it, whatever becomes of that, as its standard input closes then.
_SUPERVISED = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_POLL = 0.2


class PromptFailed(RuntimeError):
    """ComfyUI refused the prompt, or a node of it raised. Another worker would do the same."""


class WorkerDied(RuntimeError):
    """The ComfyUI of a worker went away."""


class Worker:
    """A ComfyUI of its own.

    Args:
        comfyui: folder of main.py.
        python: the interpreter of its environment.
        flags: further arguments of main.py.
        user_folder: shared by the workers of a machine.
        timeout: seconds that a start may take.
    """

    def __init__(self, comfyui: str, python: str, flags: Sequence[str], user_folder: str, timeout: float = 300) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="comfyui-", ignore_cleanup_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        Path(user_folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        database = Path(self._folder.name, "comfyui.db").as_posix()
        command = [python, "-c", _SUPERVISED, str(Path(comfyui, "main.py")), "--port", str(port)]
        command += ["--disable-auto-launch", "--user-directory", user_folder, "--database-url", f"sqlite:///{database}"]
        command += ["--output-directory", self._folder.name, "--temp-directory", self._folder.name, *flags]
        self._log = open(Path(self._folder.name, "comfyui.log"), "w+b")
        self._comfyui = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT)
        ends = time.monotonic() + timeout
        while not self._answers():
            if self._comfyui.poll() is not None or time.monotonic() > ends:
                raise self._died("did not start")
            time.sleep(_POLL)

    def run(self, prompt: Workflow) -> Files:
        """Raises PromptFailed or WorkerDied."""
        queued = self._get("/prompt", {"prompt": prompt})
        while True:
            history = json.loads(self._get(f"/history/{json.loads(queued)['prompt_id']}"))
            if history:
                break
            time.sleep(_POLL)
        (entry,) = history.values()
        if entry["status"]["status_str"] != "success":
            errors = [message for kind, message in entry["status"]["messages"] if kind == "execution_error"]
            raise PromptFailed("; ".join(each["exception_message"] for each in errors) or "it was interrupted")
        made = [file for output in entry["outputs"].values() for files in output.values() for file in files]
        saved = [file for file in made if isinstance(file, dict) and file.get("type") == "output"]
        return {file["filename"]: self._get(f"/view?{urllib.parse.urlencode(file)}") for file in saved}

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self._url}/system_stats", timeout=10).close()
        except OSError:
            return False
        return True

    def _get(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise PromptFailed(error.read().decode(errors="replace")[:2000]) from None
        except OSError as error:
            raise self._died(str(error)) from None

    def _died(self, why: str) -> WorkerDied:
        self._log.seek(0)
        return WorkerDied(f"ComfyUI {why}. Its log ends with:\n{self._log.read()[-3000:].decode(errors='replace')}")


def run_all(
    prompts: Sequence[Workflow], make: Callable[[], Any], workers: int, attempts: int = 3
) -> Iterator[tuple[int, Files | PromptFailed]]:
    """Have ``workers`` actors that ``make`` makes run all prompts; each prompt's number and result once, as they end.

    Raises:
        RayActorError, WorkerDied: workers died over one prompt ``attempts`` times.
    """
    waiting, died = deque(range(len(prompts))), Counter[int]()
    idle = [make() for _ in range(min(workers, len(prompts)))]
    running: dict[Any, tuple[int, Any]] = {}
    while waiting or running:
        while waiting and idle:
            worker, number = idle.pop(), waiting.popleft()
            running[worker.run.remote(prompts[number])] = number, worker
        (ended,), _ = ray.wait(list(running), num_returns=1)
        number, worker = running.pop(ended)
        result: Files | PromptFailed
        try:
            result = ray.get(ended)
        except PromptFailed as failure:
            result = failure
        except (RayActorError, WorkerDied):
            died[number] += 1
            if died[number] >= attempts:
                raise
            # One whose ComfyUI is gone may live on itself.
            ray.kill(worker)
            idle.append(make())
            waiting.appendleft(number)
            continue
        idle.append(worker)
        yield number, result


def keep(folder: Path, number: int, files: Files) -> None:
    """Write ``files`` into ``folder``, each whole or not at all."""
    for name, content in files.items():
        path = folder / f"{number:05}-{Path(name).name}"
        unfinished = path.with_name(f".{path.name}.part")
        unfinished.write_bytes(content)
        os.replace(unfinished, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Map prompts over ComfyUI workers.")
    parser.add_argument("prompts", nargs="+", type=Path, help="workflows in API format")
    parser.add_argument("--comfyui", required=True, help="its folder, the same on each machine")
    parser.add_argument("--python", default=sys.executable, help="the Python of ComfyUI, the same on each machine")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker; Ray gives each its own")
    parser.add_argument(
        "--user-folder", default=str(Path.home() / ".comfyui-farm"), help="shared by a machine's workers"
    )
    parser.add_argument("--flags", default="", help="of ComfyUI, such as '--cpu --use-pytorch-cross-attention'")
    parser.add_argument("--out", type=Path, default=Path("results"))
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    prompts = [json.loads(path.read_text(encoding="utf-8")) for path in chosen.prompts]
    actor = ray.remote(num_gpus=chosen.gpus)(Worker)

    def make() -> Any:
        return actor.remote(chosen.comfyui, chosen.python, chosen.flags.split(), chosen.user_folder)

    failed = 0
    for number, result in run_all(prompts, make, chosen.workers):
        if isinstance(result, PromptFailed):
            failed += 1
            sys.stderr.write(f"{chosen.prompts[number]}: {result}\n")
        else:
            keep(chosen.out, number, result)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
