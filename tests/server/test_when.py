"""``when`` of Compile Repeated Blocks on a live server: no prompt changes within, and what is left when it ends."""

import os
import signal
import sys
import time

import pytest
from hotpath_pack.hotpath import graphs
from live import TOLERANCE, serve

pytestmark = [
    pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
]
_SECONDS = 600


def helpers(live):
    """Processes that the server started to compile in."""
    children = []
    for folder in os.listdir("/proc"):
        if folder.isdecimal():
            try:
                parent = open(f"/proc/{folder}/stat").read().rpartition(")")[2].split()[1]
                command = open(f"/proc/{folder}/cmdline").read()
            except OSError:
                continue
            if int(parent) == live.server.pid and "host.compiling.helper" in command:
                children.append(int(folder))
    return children


def runs(process):
    try:
        return open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_background_samples_eager_and_then_compiled_and_leaves_no_process(tmp_path):
    with serve(tmp_path, 2, 3) as live:
        eager = live.latent(steps=2)
        first = live.sample(compiled={"when": "background"}, steps=2)
        assert (live.server.latent(first) == eager).all()
        (text,) = {text for node, text in first.texts if node == "compile"}
        assert text.endswith("eager: a helper process compiles it, and this prompt samples without (5 blocks)")
        assert len(helpers(live)) == 1
        deadline = time.monotonic() + _SECONDS
        while helpers(live):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        # The node is not executed again.
        second = live.sample(compiled={"when": "background"}, steps=2, seed=3)
        assert [text for node, text in second.texts if node == "compile"][-1].startswith(
            "2 double and 3 single blocks run as 2 regions, loaded in "
        )
        assert (live.server.latent(second) - live.latent(steps=2, seed=3)).abs().max() <= TOLERANCE
        assert live.counts()["graphs"] == 0
        live.sample(compiled={"when": "background", "dynamic": "always"}, steps=1)
        left = helpers(live)
        assert left
        # It has no chance to end anything.
        os.kill(live.server.pid, signal.SIGKILL)
        live.server.wait()
        deadline = time.monotonic() + 60
        while any(map(runs, left)):
            assert time.monotonic() < deadline, "a helper process outlived its server"
            time.sleep(0.2)
