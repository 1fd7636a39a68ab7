"""What Inductor takes for granted about the machine that it compiles on, and what of it may change meanwhile."""

from __future__ import annotations

import getpass
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

# The type of what functools.cache makes, which has no public name.
_CACHED = type(lru_cache(len))


@contextmanager
def named_user() -> Iterator[None]:
    """A scope in which the user of this process has a name, which Inductor makes folders of.

    Containers often run as a number alone, and Python asks these variables first.
    """
    if _has_name():
        yield
        return
    os.environ["USER"] = str(os.getuid())
    try:
        yield
    finally:
        os.environ.pop("USER", None)


def _has_name() -> bool:
    try:
        getpass.getuser()
    # Which of them depends on the version of Python.
    except (KeyError, OSError, ImportError):
        return False
    return True


@lru_cache
def keep_device_guard() -> None:
    """Let PyTorch trace in any thread.

    Built for CUDA and on a machine without such a device, it puts a stand-in for the device into a table of the process
    when it first traces, and the stand-in's memory is that of the thread: once that has ended the next trace crashes.
    So it is put there by a thread that does not end.
    """
    put = getattr(torch._C, "_ensureCUDADeviceGuardSet", None)
    if put is None or torch.cuda.is_available():
        return
    done = threading.Event()

    def put_and_stay() -> None:
        put()
        done.set()
        threading.Event().wait()

    threading.Thread(target=put_and_stay, name="hotpath device guard", daemon=True).start()
    done.wait()


def forget_toolchain() -> None:
    """Have Inductor look anew for the compiler and for files that it made before, which a cleaner may have taken."""
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa

    for module in (codecache, cpp_builder, cpu_vec_isa):
        for known in vars(module).values():
            if isinstance(known, _CACHED):
                known.cache_clear()


def cpp_compiler() -> str:
    """The C++ compiler that Inductor uses, looked for anew where the one of before is gone. Raises RuntimeError."""
    from torch._inductor import cpp_builder

    found = cpp_builder.get_cpp_compiler()
    if shutil.which(found) is None:
        forget_toolchain()
        found = cpp_builder.get_cpp_compiler()
    return found
