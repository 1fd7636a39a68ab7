"""What Inductor takes for granted about the machine that it compiles on, and what of it may change meanwhile."""

from __future__ import annotations

import getpass
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from .internals.compiler import forget_toolchain


@contextmanager
def named_user() -> Iterator[None]:
    """A scope in which the user of this process has a name, which Inductor makes folders of.

    Containers often run as a number alone, and Python asks these variables first.
    """
    with nullcontext() if _has_name() else variable("USER", str(os.getuid())):
        yield


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """A scope in which the environment of this process, and of those that begin within, has ``name`` at ``value``."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _has_name() -> bool:
    try:
        getpass.getuser()
    # Which of them depends on the version of Python.
    except (KeyError, OSError, ImportError):
        return False
    return True


def cpp_compiler() -> str:
    """The C++ compiler that Inductor uses, looked for anew where the one of before is gone. Raises RuntimeError."""
    from torch._inductor import cpp_builder

    found = cpp_builder.get_cpp_compiler()
    if shutil.which(found) is None:
        forget_toolchain()
        found = cpp_builder.get_cpp_compiler()
    return found
