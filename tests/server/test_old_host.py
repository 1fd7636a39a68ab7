"""A host older than what is supported: the pack stays out and the log says what to update."""

import os
import re
from pathlib import Path

import pytest
from hotpath_pack.devtools.server import HostFailed, HostServer

ROOT = Path(__file__).resolve().parent.parent.parent


def version(path, name):
    return re.search(rf'^{name} = "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)[1]


HOST = Path(os.environ["COMFYUI_PATH"])
OLDEST = version(ROOT / "host" / "__init__.py", "OLDEST_HOST")
FOUND = version(HOST / "comfyui_version.py", "__version__")


@pytest.mark.skipif(
    [int(part) for part in FOUND.split(".")] >= [int(part) for part in OLDEST.split(".")],
    reason=f"ComfyUI {FOUND} is supported",
)
def test_the_pack_refuses_to_load_and_says_what_to_update(tmp_path):
    server = HostServer(HOST, base=tmp_path)
    said = f"HotPath needs ComfyUI {OLDEST} or newer and this is {FOUND}. Update ComfyUI"
    with pytest.raises(HostFailed, match=said):
        server.start()
