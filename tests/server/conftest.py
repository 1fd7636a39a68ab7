"""Live servers that the tests of a module share."""

import pytest
from live import serve


@pytest.fixture(scope="module")
def whole_flux(tmp_path_factory):
    """19 double and 38 single blocks, and an empty compiler cache."""
    with serve(tmp_path_factory.mktemp("host"), 19, 38) as live:
        yield live


@pytest.fixture(scope="module")
def small_flux(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("host"), 2, 3) as live:
        yield live
