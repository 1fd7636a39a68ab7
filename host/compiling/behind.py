"""Blocks that a helper process compiles while prompts sample eager; what it has stored is loaded between prompts."""

from __future__ import annotations

import json
import logging
import pickle
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import nn

from ...hotpath.compiled import Bind, Region
from ...hotpath.fingerprint import PACK
from ...hotpath.settings import CompileSettings
from ...hotpath.template import NotHoistable
from ...hotpath.values import tensors_in

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
# Runs before any module of the pack can be found: the host names packs by their folders.
_BEGIN = """
import json, sys, types
source = sys.stdin.buffer
sys.path[:], name, folder = json.loads(source.readline())
pack = sys.modules[name] = types.ModuleType(name)
pack.__path__ = [folder]
__import__(f"{name}.host.compiling.helper")
sys.modules[f"{name}.host.compiling.helper"].main(source)
"""
SIZE = struct.Struct("<Q")
# Longer than any region takes, in modes that time kernels too.
_LONGEST_SECONDS = 1800
_MOST_TRIES = 2


@dataclass(frozen=True)
class Job:
    """A region to compile and store, as the helper process needs it; ``facts`` are those of this process."""

    name: str
    template: nn.Module
    bind: Bind
    settings: CompileSettings
    streams: int
    region: str
    folder: Path
    facts: Mapping[str, str]
    device: str
    threads: int
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any]
    token_dims: Mapping[str, tuple[int, ...]]
    inference: bool
    patched: bool


@dataclass
class _Asked:
    job: Job
    state: str = "waiting"
    reason: str = ""
    tries: int = 0


class Helper:
    """One process, which compiles what is asked for in order; it is started for that and ends when nothing is left.

    It reads jobs from a pipe, so that it ends with this process, whatever ends that.
    """

    def __init__(self, seconds: float = _LONGEST_SECONDS) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[bytes] | None = None
        self._asked: dict[Hashable, _Asked] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._errors: IO[bytes] | None = None

    def ask(self, key: Hashable, job: Callable[[], Job]) -> None:
        """Have ``job`` done, unless that was asked before. One that failed is tried once more."""
        with self._lock:
            asked = self._asked.get(key)
            if asked is None:
                asked = self._asked[key] = _Asked(job())
            if asked.state == "done":
                # Else it would be asked for at each prompt.
                asked.state, asked.reason = "failed", "what was compiled does not fit this process"
            elif asked.state == "failed" and asked.tries < _MOST_TRIES:
                asked.state = "waiting"
            if asked.state == "waiting" and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hotpath-helper", daemon=True)
                self._thread.start()

    def state(self, key: Hashable) -> tuple[str, str]:
        """``waiting``, ``done`` or ``failed``, and why it failed; nothing where it was not asked for."""
        asked = self._asked.get(key)
        return (asked.state, asked.reason) if asked else ("", "")

    def wait(self) -> None:
        """Wait until nothing is left to do."""
        while (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while (asked := self._next()) is not None:
            try:
                self._start()
                self._serve(asked)
            except Exception as error:
                self._fail(asked, f"the helper process could not be used: {error}")
            finally:
                self._end()

    def _next(self, serving: bool = False) -> _Asked | None:
        with self._lock:
            found = next((asked for asked in self._asked.values() if asked.state == "waiting"), None)
            if found is not None:
                found.tries += 1
            elif not serving:
                self._thread = None
            return found

    def _serve(self, asked: _Asked | None) -> None:
        """Give the process ``asked``, and what comes after it."""
        while asked is not None:
            process = self.process
            assert process is not None and process.stdin is not None and process.stdout is not None
            guard = threading.Timer(self.seconds, process.kill)
            guard.start()
            try:
                send(process.stdin, asked.job)
                answer = process.stdout.readline()
            except OSError:
                answer = b""
            finally:
                guard.cancel()
            if not answer:
                process.kill()
                status = process.wait()
                self._fail(asked, f"the helper process ended early (status {status}){self._last_words(status)}")
                return
            reason = json.loads(answer)["failed"]
            if reason:
                self._fail(asked, reason)
            else:
                asked.state = "done"
            asked = self._next(serving=True)

    def _last_words(self, status: int) -> str:
        """What the process wrote when it ended by itself with an error."""
        if status <= 0 or self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def _fail(self, asked: _Asked, reason: str) -> None:
        log.warning("%s region was not compiled in the background: %s", asked.job.name, reason)
        asked.reason = reason
        asked.state = "failed"

    def _start(self) -> None:
        from comfy.cli_args import args

        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Windows would open a console.
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        assert self.process.stdin is not None
        first = json.dumps([[str(entry) for entry in sys.path], PACK, str(_ROOT)])
        self.process.stdin.write(first.encode() + b"\n")
        send(self.process.stdin, vars(args))

    def _end(self) -> None:
        process, self.process = self.process, None
        if self._errors is not None:
            self._errors.close()
        if process is None:
            return
        with suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


HELPER = Helper()


class Behind:
    """What one node decided in this prompt about each variant of a region: compiled, or eager to its end."""

    def __init__(self, helper: Helper | None = None) -> None:
        self.helper = helper or HELPER
        self._prompt: object = None
        self._compiled: dict[Hashable, bool] = {}

    def begin(self, prompt: object) -> None:
        """A sampling run of ``prompt`` begins; None is another prompt each time."""
        if prompt is None or prompt != self._prompt:
            self._prompt = prompt
            self._compiled.clear()

    def require(self, region: Region, job: Callable[[], Job], weights: dict[str, Any], inputs: dict[str, Any]) -> None:
        """Return where ``region`` runs these arguments compiled in this prompt.

        Raises:
            NotHoistable: it runs eager, and why.
        """
        variant = _variant(region, inputs)
        compiled = self._compiled.get(variant)
        if compiled is None:
            compiled = self._compiled[variant] = self.ready(region, job, weights, inputs)
        if compiled:
            return
        if region.kept is None:
            raise NotHoistable(f"it can't be compiled in the background: its cache is {region.stats.cache}")
        state, reason = self.helper.state(variant)
        if state == "failed":
            raise NotHoistable(f"it was not compiled in the background: {reason}")
        raise NotHoistable("a helper process compiles it, and this prompt samples without")

    def ready(self, region: Region, job: Callable[[], Job], weights: dict[str, Any], inputs: dict[str, Any]) -> bool:
        """Whether ``region`` has code for these arguments, loaded where it is stored; else the helper is asked."""
        if region.kept is None:
            return False
        if region.find(weights, inputs):
            return True
        self.helper.ask(_variant(region, inputs), job)
        return False


def _variant(region: Region, inputs: Mapping[str, Any]) -> Hashable:
    """What may need a graph of its own: batch sizes, and sizes of 1; without dynamic sizes all of them."""
    shapes = [tuple(tensor.shape) for tensor in tensors_in(inputs)]
    if region.settings.dynamic != "never":
        shapes = [(*shape[:-1][:1], *(min(size, 2) for size in shape[1:])) for shape in shapes]
    return region.kept and region.kept.region, tuple(shapes)


def send(pipe: Any, value: Any) -> None:
    """Write ``value`` so that ``helper`` reads it."""
    data = pickle.dumps(value)
    pipe.write(SIZE.pack(len(data)) + data)
    pipe.flush()
