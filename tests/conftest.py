"""Loads the pack the way a host does: as a package of another name, with the root off ``sys.path``.

The root's ``nodes`` would otherwise shadow the host's module of that name.
"""

import os
import shutil
import sys
import types
from pathlib import Path

# Before torch is imported. In tensors this small threads cost more than they do, ten times when the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pack = types.ModuleType("hotpath_pack")
pack.__path__ = [str(ROOT)]
sys.modules["hotpath_pack"] = pack

import sweeps  # noqa: E402
from hotpath_pack import dev  # noqa: E402
from hotpath_pack.devtools import environments  # noqa: E402

# A shared machine can take any time for an example.
hypothesis.settings.register_profile("hotpath", deadline=None)
hypothesis.settings.load_profile("hotpath")


def pytest_xdist_auto_num_workers(config):
    """One core each, and memory for a host and a server each; what is measured on a GPU wants it alone."""
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 4)


def pytest_addoption(parser):
    sweeps.add_options(parser)


def pytest_report_header(config):
    return sweeps.header(config)


def pytest_terminal_summary(terminalreporter, config):
    sweeps.summarize(terminalreporter, config)


def pytest_collection_modifyitems(config, items):
    sweeps.choose(config, items)
    sweeps.longest_first(config, items)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture
def one_compile_only():
    """Any recompile in the test is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """The archive of ``dev.py package``; test files that run side by side make it one after the other."""
    cache = environments.cache_folder(os.environ, sys.platform, Path.home())
    cache.mkdir(parents=True, exist_ok=True)
    with environments.locked(cache / "package.lock"):
        return Path(shutil.copy(dev.package(cache), tmp_path_factory.mktemp("packed")))
