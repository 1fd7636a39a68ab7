"""What went wrong while code for a block was made or first run, and whose fault it was."""

from __future__ import annotations

from types import CodeType

import torch
from torch._dynamo.exc import TorchRuntimeError

from .attention import ATTENTION_CODE
from .counters import source_line
from .reasons import first_useful_line


class Uncompiled(Exception):
    """PyTorch runs the function that was to be compiled as it is. Nothing of the block has run."""

    def __str__(self) -> str:
        return "PyTorch left it as it is, as torch.compiler.set_stance of another node or a switch of PyTorch asks"


class RegionFailed(RuntimeError):
    """No compiled code could be had for a block. Its inputs are as they were. The cause is the error behind it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"the {name} region could not be compiled: {reason}")

    @property
    def may_be_blocks_own(self) -> bool:
        """Whether the block may fail so without compiling too: its operations refuse its inputs, or memory is short."""
        return isinstance(self.__cause__, (TorchRuntimeError, torch.OutOfMemoryError))


class CompiledCodeFailed(RegionFailed):
    """Compiled code raised when it first ran."""

    def __init__(self, name: str, reason: str) -> None:
        RuntimeError.__init__(self, f"the compiled code of the {name} region failed: {reason}")


def went_through(error: BaseException, code: CodeType | str) -> bool:
    """Whether ``error`` was raised below a frame of ``code``, given itself or by the name of what was compiled from it.

    Dynamo runs what it makes of a function under the function's own name.
    """
    traceback = error.__traceback__
    while traceback is not None:
        running = traceback.tb_frame.f_code
        if running is code or running.co_name == code:
            return True
        traceback = traceback.tb_next
    return False


def belongs_to_host(error: BaseException) -> bool:
    """Whether what compiled code raised is the computation's own: no memory is left, or a patch around attention."""
    return isinstance(error, torch.OutOfMemoryError) or went_through(error, ATTENTION_CODE)


def reason_of(error: BaseException) -> str:
    """The line of ``error`` that helps most, with the source line that was traced."""
    # What a backend raised says more than Dynamo's sentence around it.
    inner = getattr(error, "inner_exception", error)
    return first_useful_line(inner) + source_line(getattr(error, "real_stack", ()) or ())


def failure_of(name: str, error: BaseException, ran: bool = False) -> RegionFailed:
    """What to raise from ``error``, which came from getting code for the region ``name``, or as it ``ran``."""
    return (CompiledCodeFailed if ran else RegionFailed)(name, reason_of(error))
