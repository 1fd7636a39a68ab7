"""A region gives blocks the options that its family knows: where this version of the host reads more, and a call has
it, blocks run as they are."""

import inspect

import comfy.ldm.flux.layers
import pytest
from hotpath_pack.host.families import FAMILIES
from hotpath_pack.host.families.reads import ANY, options_read
from sampling import assert_parity, compiled, compiled_blocks

SINGLE = comfy.ldm.flux.layers.SingleStreamBlock


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_nothing_more_in_the_host_that_is_tested(family):
    for kind in family.kinds:
        assert options_read(kind.block) <= set(kind.interface.reads) and not kind.unknown_options


@pytest.mark.parametrize(
    "code, read",
    [
        ('return transformer_options.get("scale", 1)', {"scale"}),
        ('return transformer_options["scale"]', {"scale"}),
        ('return "scale" in transformer_options', {"scale"}),
        ('transformer_options["seen"] = 1', set()),
        ("extra = transformer_options.copy()", set()),
        ("return helper(1, transformer_options)", {"of_the_helper"}),
        ("return Inner()(transformer_options=transformer_options)", {"of_the_inner"}),
        ("key = str(1)\n        return transformer_options[key]", {ANY}),
        ("return sorted(transformer_options.items())", {ANY}),
        ("return 1", set()),
    ],
)
def test_what_code_reads(host_module, code, read):
    source = f"""
from torch import nn

def helper(x, transformer_options):
    return transformer_options.get("of_the_helper")

class Inner(nn.Module):
    def forward(self, transformer_options={{}}):
        return transformer_options.get("of_the_inner")

class Block(nn.Module):
    def forward(self, x, transformer_options={{}}):
        {code}
"""
    assert options_read(host_module("comfy.ldm.flux.newer", source).Block) == read


def test_a_block_that_reads_another_option_runs_as_it_is_where_that_is_given(flux, host_module, monkeypatch):
    """By a copy of the host's file in which single blocks scale what they give."""
    source = inspect.getsource(comfy.ldm.flux.layers).replace(
        "attn = attention(q, k, v, pe=pe, mask=attn_mask, transformer_options=transformer_options)",
        "attn = attention(q, k, v, pe=pe, mask=attn_mask, transformer_options=transformer_options)\n"
        '        attn = attn * transformer_options.get("scale", 1)',
    )
    newer = host_module("comfy.ldm.flux.newer", source)
    kinds = [kind for family in FAMILIES for kind in family.kinds if kind.block is SINGLE]
    read = options_read(newer.SingleStreamBlock)
    assert read == {"patches", "scale"}
    for kind in kinds:
        monkeypatch.setitem(kind.__dict__, "unknown_options", read.difference(kind.interface.reads))
    fast = compiled(flux)
    assert_parity(flux, fast)
    assert compiled_blocks(fast).eager == {}
    scaled = flux.clone()
    scaled.model_options["transformer_options"]["scale"] = 0.5
    fast = compiled(scaled, on_failure="eager")
    assert_parity(scaled, fast)
    (told,) = compiled_blocks(fast).eager
    assert "it reads the option scale in a way that HotPath does not know" in told
