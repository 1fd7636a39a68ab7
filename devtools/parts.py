"""Where the wall time of a first step goes, by part of the compiler: threads are looked at every few milliseconds."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from types import CodeType, FrameType

_SECONDS = 0.004
# All that these call belongs to their part, unless another of them calls it in between: path of the file, and
# functions.
_WHOLE = (
    ("hotpath/graphs.py", ("to_bytes",), "pickling"),
    ("hotpath/artifacts.py", ("add", "write"), "storing"),
    ("hotpath/graphs.py", ("load_graph",), "loading what was stored"),
    ("_dynamo/convert_frame.py", ("build_guards",), "guards"),
    ("triton/runtime/build.py", (), "Triton's driver"),
    ("triton/backends/nvidia/driver.py", ("__init__",), "Triton's driver"),
    ("triton_heuristics.py", ("benchmark_all_configs", "autotune_to_one_config", "bench"), "kernels timed"),
    ("_inductor/async_compile.py", ("wait", "_wait_futures"), "kernels waited for"),
    ("_inductor/async_compile.py", ("warm_pool", "wakeup", "process_pool"), "pool of workers"),
    ("_inductor/async_compile.py", ("triton",), "kernels compiled here, one by one"),
    ("_inductor/codecache.py", ("torch_key",), "hashing of PyTorch and Triton"),
    ("triton/runtime/cache.py", ("triton_key",), "hashing of PyTorch and Triton"),
    ("_inductor/cpp_builder.py", (), "C++ compiler started or probed"),
    ("_inductor/cpu_vec_isa.py", (), "C++ compiler started or probed"),
)
# Otherwise the innermost of these counts; no functions are all functions of a file.
_INNERMOST = (
    ("<frozen importlib", (), "imports"),
    ("triton_heuristics.py", (), "kernels loaded"),
    ("_inductor/fx_passes", (), "Inductor's graph passes"),
    ("_inductor/pattern_matcher.py", (), "Inductor's graph passes"),
    ("_inductor/", (), "Inductor's lowering, scheduling and code"),
    ("_functorch/", (), "AOT autograd"),
    ("_dynamo/guards.py", (), "guards"),
    ("_dynamo/", (), "tracing"),
    ("hotpath/fingerprint.py", (), "dependencies and facts"),
    ("hotpath/artifacts.py", (), "dependencies and facts"),
    ("/host/", (), "collecting weights and running the step"),
)
OTHER = "the host: loading, and the step itself"


class Parts:
    """Seconds by part, of each thread whose name is ``MainThread`` or begins with ``hotpath``, while it is entered."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._known: dict[tuple[str, str], tuple[str, str]] = {}
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="parts", daemon=True)

    def __enter__(self) -> Parts:
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watcher.join()

    def table(self, thread: str = "MainThread") -> dict[str, float]:
        """Seconds of ``thread`` by part, the longest first."""
        return dict(sorted(self.seconds[thread].items(), key=lambda item: -item[1]))

    def _watch(self) -> None:
        before = time.perf_counter()
        while not self._done.wait(_SECONDS):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            frames = sys._current_frames()
            now = time.perf_counter()
            for ident, frame in frames.items():
                name = names.get(ident, "")
                if name == "MainThread" or name.startswith("hotpath"):
                    self.seconds[name][self._part(frame)] += now - before
            before = now

    def _part(self, frame: FrameType | None) -> str:
        inner = ""
        while frame is not None:
            whole, part = self._of(frame.f_code)
            if whole:
                return whole
            inner = inner or part
            frame = frame.f_back
        return inner or OTHER

    def _of(self, code: CodeType) -> tuple[str, str]:
        # Code of two files may be equal.
        place = code.co_filename, code.co_name
        found = self._known.get(place)
        if found is None:
            found = self._known[place] = _find(_WHOLE, code), _find(_INNERMOST, code)
        return found


def _find(table: tuple[tuple[str, tuple[str, ...], str], ...], code: CodeType) -> str:
    path = code.co_filename.replace("\\", "/")
    name = code.co_name
    return next((part for place, names, part in table if place in path and name in (names or [name])), "")
