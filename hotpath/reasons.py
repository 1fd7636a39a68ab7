"""What PyTorch and compilers say, in plain words: why code was compiled again, why it could not be."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

THROWN_AWAY = "PyTorch had dropped the compiled code, as another node can have it do (torch._dynamo.reset)"
_OTHERWISE = "something that the code was compiled for is not as it was"

# What Dynamo checks: pattern -> plain words. ``{name}`` is the input or weight that it names, groups are its own.
_GUARDS = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"size mismatch at index 0\. expected (\d+), actual (\d+)", "batch size changed from {0} to {1}"),
        (r"size mismatch at index (\d+)\. expected (\d+), actual (\d+)", "size {0} of {name} changed from {1} to {2}"),
        (r"' (dtype|device|rank|requires_grad) mismatch", "{0} of {name} changed"),
        (r"device index mismatch", "device of {name} changed"),
        (r"(stride mismatch|is_contiguous|\.stride\(\)|storage_offset)", "{name} lies in memory in another order"),
        (
            r"dispatch key set mismatch|expected type of .* to be a tensor|is_inference",
            "kind of tensor of {name} changed",
        ),
        (r"2 <= [^<>=&|]*\.size\(\)\[0\]|\.size\(\)\[0\] (?:!= 1|>= 2|> 1)\b", "batch size changed to 1"),
        (
            r"2 <= [^<>=&|]*\.size\(\)\[(\d+)\]|\.size\(\)\[(\d+)\] (?:!= 1|>= 2|> 1)\b",
            "size {0} of {name} changed to 1",
        ),
        (r"\.size\(\)\[0\]", "batch size is not one that the code was compiled for"),
        (r"\.size\(\)\[(\d+)\]", "size {0} of {name} is not one that the code was compiled for"),
        (r"_dynamo_\w*dynamic_indices|_dynamo_\w+_dims", "which sizes of {name} may vary changed"),
        (r"[Dd]uplicate tensor|alias|WEAKREF", "which inputs share memory changed"),
        (r"grad_mode|is_grad_enabled|GRAD_MODE", "whether PyTorch records gradients changed"),
        (r"num_threads", "number of CPU threads changed"),
        (r"deterministic", "PyTorch's deterministic algorithms were switched on or off"),
        (r"allow_tf32|TF32|fp32_precision", "TF32 was switched on or off"),
        (r"default_dtype", "PyTorch's default dtype changed"),
        (r"autocast", "autocast was switched on or off"),
        (r"CURRENT_DEVICE|default_device", "PyTorch's default device changed"),
        (r"(?i)global.?state", "a switch of PyTorch changed"),
        (r"(?i)torch_?function", "another node changed how PyTorch's functions are called"),
        (r"deallocated|invalidated", THROWN_AWAY),
        (r"\bis (?:not )?None\b|NoneType", "{name} was left out before, or is now"),
        (r"^len\(|\blen\(|keys\(|DICT_|KeyError", "{name} holds another number of values"),
        (r"^([\w.~]+) was replaced$", "{0} was replaced"),
    )
)
_NAMES = re.compile(r"\['([\w.]+)'\]")
_ROOTS = frozenset({"inputs", "weights"})

# A compiler's own complaint among the lines that it writes.
_COMPLAINT = re.compile(r"(?i)\b(?:error|cannot|can't|no such file|no space left|undefined reference|not found)\b")
# The line that a traceback ends with.
_ERROR = re.compile(r"[\w.]*(?:Error|Exception|Exit|Interrupt|Invalid)\b")
_LONGEST = 300
# What PyTorch calls a size that is to be any.
_ANY_SIZE = re.compile(r"Could not \w+ .*\bdata-dependent expression\b")


def plain_reason(reason: str) -> str:
    """``batch size changed from 1 to 2`` for what Dynamo says of a guard; never Dynamo's own words."""
    # Lines after the first are code that the guard was made for.
    first = next(iter(reason.strip().splitlines()), "")
    names = [name for name in _NAMES.findall(first) if name not in _ROOTS]
    name = names[0] if names else "an input"
    for pattern, words in _GUARDS:
        if found := pattern.search(first):
            return words.format(*(group for group in found.groups() if group is not None), name=name)
    return f"{name} is of another kind than before" if names else _OTHERWISE


def how_to_avoid(reason: str, dynamic: str) -> str:
    """The setting that keeps a plain ``reason`` from compiling again; empty when none does."""
    if dynamic == "auto" and reason.startswith("batch size"):
        return "dynamic: 'always' takes all batches of two and more at once"
    if dynamic == "never":
        return "dynamic: 'auto' compiles once for all sizes"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, else its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def first_useful_line(error: BaseException) -> str:
    """The one line of an error that says most: of a compiler's output its first complaint, never PyTorch's headline."""
    output = _output_of(error)
    lines = [line.strip() for line in (output or str(error)).splitlines() if line.strip()]
    if output is not None:
        line = next(filter(_COMPLAINT.search, lines), next(iter(lines), "nothing"))
        return f"the compiler says: {line[:_LONGEST]}"
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        # What failed in another process; its own error is what its traceback ends with.
        lines = [line for line in lines if _ERROR.match(line)][-1:] or lines
    line = next(iter(lines), "")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space is left on the disk{f' for {error.filename}' if error.filename else ''}"
    if not line:
        return type(error).__name__
    if _ANY_SIZE.search(line):
        return "sizes that may be any decide what it computes (dynamic: 'auto' compiles for those that are there)"
    # What Python itself raises for a mistake in code says little without its name.
    nameless = type(error).__module__ != "builtins" or isinstance(error, (RuntimeError, OSError))
    return line[:_LONGEST] if nameless else f"{type(error).__name__}: {line[:_LONGEST]}"


def _output_of(error: BaseException) -> str | None:
    """What a compiler wrote before it ended, where ``error`` or what it was raised from has it."""
    for link in _chain(error):
        written = getattr(link, "stderr", None) or getattr(link, "output", None)
        if isinstance(written, bytes):
            # In the system's encoding, which need not be UTF-8.
            written = written.decode(errors="replace")
        if isinstance(written, str) and written.strip():
            return written
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
