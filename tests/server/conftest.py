"""Live servers that the tests of a module share."""

import os

import pytest
from live import serve


@pytest.fixture(scope="module")
def whole_flux(tmp_path_factory):
    """19 double and 38 single blocks, an empty compiler cache, and the threads of a user's server."""
    # Threads that spin while they wait take what other tests compute with, several times over.
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "PASSIVE"}
    with serve(tmp_path_factory.mktemp("host"), 19, 38, **threads) as live:
        yield live


@pytest.fixture(scope="module")
def small_flux(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("host"), 2, 3) as live:
        yield live
