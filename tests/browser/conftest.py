"""A real Chromium on a live server, skipped where the machine has none."""

import pytest
from hotpath_pack.devtools.browser import canvas, chromium, find_chromium
from live import serve


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    with serve(tmp_path_factory.mktemp("host"), 2, 3) as live:
        yield live


@pytest.fixture(scope="module")
def browser(live):
    with chromium() as browser:
        yield browser


@pytest.fixture(params=[False, True], ids=["classic", "Nodes 2.0"])
def page(request, browser, live):
    with canvas(browser, live.server, vue=request.param) as shown:
        yield shown
        assert shown.errors == []


@pytest.fixture(params=[False, True], ids=["classic, light", "Nodes 2.0, light"])
def light_page(request, browser, live):
    with canvas(browser, live.server, vue=request.param, light=True) as shown:
        yield shown
        assert shown.errors == []
