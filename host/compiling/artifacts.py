"""Where ComfyUI keeps compiled blocks, and what of ComfyUI and this pack they depend on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfyui_version import __version__ as comfyui_version
from torch import nn

from ...hotpath.artifacts import Kept, Store
from ...hotpath.environment import environment
from ...hotpath.fingerprint import NotPortable, function_text, structure_text, text_of
from ...hotpath.graphs import supported
from ...hotpath.settings import CompileSettings

CACHE = ("auto", "off")


def store() -> Store:
    """Compiled blocks of this ComfyUI's user, in a folder that the host does not serve over HTTP."""
    return Store(Path(folder_paths.get_system_user_directory("hotpath")))


def facts(device: torch.device) -> dict[str, str]:
    """All that compiled code depends on beside the region itself."""
    return {"ComfyUI": comfyui_version, "HotPath": _pack_version, **environment(device)}


def kept_region(
    name: str,
    template: nn.Module,
    bind: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    settings: CompileSettings,
    kinds: Hashable,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Kept:
    """Where the graphs of a region are kept from one start of ComfyUI to the next.

    Raises:
        NotPortable: they can't be; the message says why.
    """
    why_not = unsupported(settings, device)
    if why_not:
        raise NotPortable(why_not)
    chosen = (settings.mode, settings.dynamic)
    # One file a kind of GPU, where a machine has several.
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    text = text_of((name, chosen, kinds, dtypes, torch.is_inference_mode_enabled(), gpu))
    region = "\n".join((text, function_text(bind), structure_text(template)))
    try:
        facts(device)
    except AttributeError as error:
        # A PyTorch that is newer than what the tests pass with may have moved a switch.
        raise NotPortable(f"PyTorch {torch.__version__} is not known well enough ({error})") from error
    return Kept(store(), region, functools.partial(facts, device))


def unsupported(settings: CompileSettings, device: torch.device) -> str:
    """Why nothing is kept with these settings; empty when it is."""
    if device.type not in ("cpu", "cuda"):
        return f"devices of kind {device.type} can't be told from one another"
    if not supported():
        return f"PyTorch {torch.__version__} can't keep what it compiles; 2.11 and newer can"
    if settings.backend != "inductor":
        return f"the backend {settings.backend} makes no code that could be kept"
    if not settings.fullgraph:
        return "without fullgraph there may be several graphs a block"
    return ""


def require_kept(settings: CompileSettings, device: torch.device, cache: str) -> None:
    """Raise ValueError where ``when`` can't be ``background``, since what another process compiles can't be kept."""
    if cache != "auto":
        raise ValueError(
            "when: 'background' takes what it compiles from the cache. Set cache to 'auto', or when to 'wait'."
        )
    if why_not := unsupported(settings, device):
        raise ValueError(f"when: 'background' is not possible here, as {why_not}. Choose 'wait'.")


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    pack = Path(__file__).parents[2]
    for path in sorted((*pack.glob("hotpath/**/*.py"), *pack.glob("host/**/*.py"))):
        digest.update(path.relative_to(pack).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


# Read while the modules are, since an update may change the files while ComfyUI runs.
_pack_version = _digest_of_sources()
