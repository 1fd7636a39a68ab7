"""A template called with weights of a block: as torch.func.functional_call, in fewer steps to trace."""

import pytest
import torch
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.internals.kept import traced_lines
from hotpath_pack.hotpath.placing import call_placed, places_in
from test_graphs import region, run
from torch import nn
from torch.nn import LayerNorm, Linear


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(8, device="meta"))
        self.unused = nn.Parameter(torch.empty(8, device="meta"))
        self.register_parameter("nothing", None)
        self.inner = nn.Sequential(Linear(8, 8, device="meta"), LayerNorm(8, device="meta"))

    def forward(self, x, fails=False):
        if fails:
            raise KeyError("x")
        return self.inner(x) * self.scale


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_in_their_places_while_it_runs_and_no_longer(fails):
    template = Nested()
    before = dict(template.named_parameters())
    given = {name: torch.randn(weight.shape) for name, weight in before.items()}
    x = torch.randn(2, 8)
    if fails:
        with pytest.raises(KeyError):
            call_placed(template, places_in(template), given, {"x": x, "fails": True})
    else:
        got = call_placed(template, places_in(template), given, {"x": x})
        assert torch.equal(got, torch.func.functional_call(template, given, (x,)))
    after = dict(template.named_parameters())
    assert list(after) == list(before) and all(after[name] is weight for name, weight in before.items())


@pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")
@torch.no_grad()
def test_nothing_is_traced_to_find_a_weight(tmp_path):
    made = region(tmp_path)
    run(made)
    (graph,) = made._graphs
    traced = {module for module, _ in traced_lines(graph._function)}
    assert not {module for module in traced if module.startswith(("torch.nn.utils", "torch._functorch", "contextlib"))}
    assert any(module.endswith(".placing") for module in traced)
