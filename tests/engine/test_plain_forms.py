"""Operators that stand for elementwise ones are traced as those, in graphs of any size and in what is kept."""

import pytest
import torch
from hotpath_pack.hotpath import graphs, plain_forms
from hotpath_pack.hotpath.artifacts import FIRST_TIME, Kept, Store
from hotpath_pack.hotpath.compiled import CompileSettings, Region
from hotpath_pack.hotpath.environment import environment
from torch import nn
from torch.nn import Linear

needs_ahead = pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")
CALLS = []


@torch.library.custom_op("hotpath_test::adaln", mutates_args=())
def adaln(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    CALLS.append(x.shape)
    return plain_forms._FORMS["comfy_kitchen::adaln"](x, scale, shift, eps)


@adaln.register_fake
def _(x, scale, shift, eps):
    return torch.empty_like(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = Linear(8, 8, device="meta")

    def forward(self, x, scale, shift):
        return self.linear(torch.ops.hotpath_test.adaln(x, scale, shift, eps=1e-6)) + adaln(x, shift, scale, 1e-6)


def as_they_are(inputs):
    return inputs


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=needs_ahead)])
def test_the_operator_is_not_called(tmp_path, monkeypatch, ahead):
    kept = Kept(Store(tmp_path / "kept"), "a block", lambda: environment(torch.device("cpu"))) if ahead else None
    region = Region("double block", Block(), as_they_are, CompileSettings(), kept=kept)
    weights = {"linear.weight": torch.randn(8, 8), "linear.bias": torch.randn(8)}
    forms = plain_forms._FORMS
    monkeypatch.setattr(plain_forms, "_FORMS", {"hotpath_test::adaln": forms["comfy_kitchen::adaln"]})
    for batch, tokens in ((1, 4), (1, 9), (2, 4)):
        x, scale, shift = torch.randn(batch, tokens, 8), torch.randn(batch, 1, 8), torch.randn(batch, 1, 8)
        normed = nn.functional.layer_norm(x, (8,), eps=1e-6)
        want = nn.functional.linear(normed * (1 + scale) + shift, weights["linear.weight"], weights["linear.bias"])
        want += normed * (1 + shift) + scale
        CALLS.clear()
        region_inputs = {"x": x, "scale": scale, "shift": shift}
        got = region(weights, region_inputs, {"x": (1,)})
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert not CALLS
    assert region.stats.graphs == 2 and region.stats.cache == (FIRST_TIME if ahead else "off")
