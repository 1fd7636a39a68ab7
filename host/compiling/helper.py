"""The helper process of ``behind``: reads jobs from its input until that ends, compiles, stores, and answers each."""

from __future__ import annotations

import functools
import json
import os
import pickle
import queue
import threading
from contextlib import nullcontext
from typing import IO, Any

import torch
from torch import Tensor

from ...hotpath.artifacts import Kept, Store
from ...hotpath.attention import attention_scope, joined
from ...hotpath.compiled import Region
from ...hotpath.environment import difference
from ...hotpath.examples import example_inputs, example_weights
from ...hotpath.failures import RegionFailed, reason_of
from ...hotpath.preflight import compile_problems
from ...hotpath.starting import start_compiler
from .behind import SIZE, Job


def main(source: IO[bytes]) -> None:
    """Serve the process that started this one: what anything prints goes nowhere, and answers are a line each."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    if hasattr(os, "nice"):
        # Whoever samples comes first.
        os.nice(5)
    from comfy.cli_args import args

    vars(args).update(_read_value(_receive(source)))
    jobs: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(source, jobs), daemon=True).start()
    while data := jobs.get():
        answers.write(json.dumps({"failed": _done(data)}).encode() + b"\n")
        jobs.task_done()


def _read_value(data: bytes) -> Any:
    # From the process that started this one, through a pipe that nobody else has.
    return pickle.loads(data)  # noqa: S301


def _receive(source: IO[bytes]) -> bytes:
    return source.read(*SIZE.unpack(source.read(SIZE.size)))


def _read(source: IO[bytes], jobs: queue.Queue[bytes]) -> None:
    """Pass jobs on; end this process with the pipe: nobody waits for what is under way."""
    while len(size := source.read(SIZE.size)) == SIZE.size:
        jobs.put(source.read(*SIZE.unpack(size)))
    if jobs.unfinished_tasks:
        os._exit(1)
    jobs.put(b"")


def _done(data: bytes) -> str:
    """Do a job; why it failed, or nothing."""
    try:
        # Reads modules of the host, now that its arguments are as in the process that asks.
        return _compile(_read_value(data))
    except Exception as error:
        return reason_of(error)


def _compile(job: Job) -> str:
    from .artifacts import facts

    device = torch.device(job.device)
    torch.set_num_threads(job.threads)
    kept = Kept(Store(job.folder), job.region, functools.partial(facts, device))
    if other := difference(job.facts, kept.facts()):
        return f"the helper process is not as ComfyUI's own is: {other}"
    dtypes = [told.dtype for told in job.weights.values()]
    if problems := compile_problems(job.settings.backend, device, dtypes):
        return "; ".join(problems)
    start_compiler(device)
    with torch.inference_mode(job.inference):
        region = Region(job.name, job.template, job.bind, job.settings, job.streams, kept)
        weights, inputs = example_weights(job.weights, device), example_inputs(job.inputs, device)
        region.prepare(weights, inputs, job.token_dims)
        try:
            with attention_scope(_stand_in) if job.patched else nullcontext():
                region.run(weights, inputs, job.token_dims)
        except (RegionFailed, torch.OutOfMemoryError):
            # Beside what samples there may be no memory to run it. Then kernels are chosen in the first step.
            region.keep_prepared()
    return region.stats.cache.partition("not stored: ")[2]


def _stand_in(q: Tensor, k: Tensor, v: Tensor, pe: Any, mask: Any, slices: Any) -> Tensor:
    """In place of patched attention, which runs outside of the region."""
    return joined(q)
