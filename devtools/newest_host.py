"""A copy of a ComfyUI whose Flux blocks have the structure of 0.46, so that tests guard what users have before it
can be installed: a module by which a block prefers an attention, single-owner containers around q, k and v,
and a modulated norm that is one operator.

Only the host's own files are rewritten, by the few places that differ; what is added is written here.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

_OF_THE_USER = ("models", "input", "output", "user", "temp", "custom_nodes")

_ATTENTION_TYPES = '''
class ComfyAttention(nn.Module):
    """By which a block prefers an attention function: none, unless a checkpoint or a LoRA brings one."""

    def __init__(self):
        super().__init__()
        self.config = None
        self.function = None


class AttentionTensorContainer:
    """A tensor that whoever computes with it takes over."""

    __slots__ = ("tensor",)

    def __init__(self, tensor):
        self.tensor = tensor

    def take(self):
        if self.tensor is None:
            raise RuntimeError("this tensor was taken before")
        tensor, self.tensor = self.tensor, None
        return tensor


def wrap_attn(func):
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        preferred = kwargs.pop("preferred_attention", None)
        held = args[:3] if isinstance(args[0], AttentionTensorContainer) else None
        outermost = kwargs.setdefault("_inside_attn_wrapper", False) is False
        kwargs["_inside_attn_wrapper"] = True
        options = kwargs.get("transformer_options") or {}
        override = options.get("optimized_attention_override") if outermost else None
        if override is None and outermost and preferred is not None and preferred.function is not None:
            return preferred.function(*args, **kwargs)
        if override is not None and held is not None and hasattr(override, "container_function"):
            return override.container_function(*args, **kwargs)
        if override is None and held is not None and wrapper.container_function is not None:
            return wrapper.container_function(*args, **kwargs)
        if held is not None:
            args = tuple(container.take() for container in held) + args[3:]
        return func(*args, **kwargs) if override is None else override(func, *args, **kwargs)

    wrapper.container_function = None
    return wrapper

'''

_ATTENTION = """
def attention(q, k, v, pe, mask=None, transformer_options={}, preferred_attention=None):
    if isinstance(q, AttentionTensorContainer):
        q, k, v = q.take(), k.take(), v.take()
    if pe is not None:
        q, k = apply_rope(q, k, pe)
    heads = q.shape[1]
    q, k, v = map(AttentionTensorContainer, (q, k, v))
    return optimized_attention(
        q,
        k,
        v,
        heads,
        skip_reshape=True,
        mask=mask,
        transformer_options=transformer_options,
        preferred_attention=preferred_attention,
    )

"""

_MODULATED_NORM = """
def modulated_norm(x, norm, scale, shift, modulation_dims=None):
    if modulation_dims is None and not comfy.model_management.in_training:
        return comfy.quant_ops.ck.adaln(x, scale, shift, norm.eps)
    return apply_mod(norm(x), 1 + scale, shift, modulation_dims)

"""

# Pattern, what takes its place, and how often it is there.
_EDITS: dict[str, list[tuple[str, Any, int]]] = {
    "comfy/ldm/modules/attention.py": [
        (r"\ndef wrap_attn\(func\):\n(?:[ ]+.*\n|\n)+", lambda found: _ATTENTION_TYPES, 1),
    ],
    "comfy/ldm/flux/math.py": [
        (r"import optimized_attention\n", "import AttentionTensorContainer, optimized_attention\n", 1),
        (r"\ndef attention\(.*\n(?:[ ]+.*\n|\n)+", lambda found: _ATTENTION, 1),
    ],
    "comfy/ldm/flux/layers.py": [
        (
            r"from \.math import attention, rope\n",
            "import comfy.model_management\nimport comfy.quant_ops\n"
            "from comfy.ldm.modules.attention import AttentionTensorContainer, ComfyAttention\n"
            "from .math import attention, rope\n",
            1,
        ),
        (r"\ndef apply_mod\((?:.*\n)(?:[ ]+.*\n|\n)+", lambda found: found[0] + _MODULATED_NORM.lstrip("\n"), 1),
        (r"(        self\.(?:modulation = modulation|hidden_dim = hidden_size)\n)",
         r"\1        self.comfy_attention = ComfyAttention()\n", 2),
        (
            r" attention\(q, k, v, pe=pe",
            " attention(*map(AttentionTensorContainer, (q, k, v)), preferred_attention=self.comfy_attention, pe=pe",
            2,
        ),
        (
            r"(\w+) = self\.(\w+)\((\w+)\)\n +\1 = apply_mod\(\1, \(1 \+ ([\w.]+)\), ",
            r"\1 = modulated_norm(\3, self.\2, \4, ",
            2,
        ),
        (r"apply_mod\(self\.(\w+)\((\w+)\), \(1 \+ ([\w.]+)\), ", r"modulated_norm(\2, self.\1, \3, ", 4),
    ],
}  # fmt: skip


def is_newest(comfyui: Path) -> bool:
    """Whether that ComfyUI has this structure already."""
    return "ComfyAttention" in (comfyui / "comfy/ldm/flux/layers.py").read_text(encoding="utf-8")


def make_newest(comfyui: Path, folder: Path) -> Path:
    """A copy of ``comfyui`` in ``folder`` with that structure.

    Raises:
        ValueError: its files are not what they are rewritten from.
    """

    def left_out(path: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name in (".git", "__pycache__") or (Path(path) == comfyui and name in _OF_THE_USER)
        ]

    shutil.copytree(comfyui, folder, ignore=left_out)
    for name in _OF_THE_USER:
        (folder / name).mkdir()
    for name, edits in _EDITS.items():
        text = (comfyui / name).read_text(encoding="utf-8")
        for pattern, by, count in edits:
            text, found = re.subn(pattern, by, text)
            if found != count:
                raise ValueError(f"{name} has {found} times what was expected {count} times: {pattern}")
        (folder / name).write_text(text, encoding="utf-8")
    return folder
