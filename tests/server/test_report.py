"""Compile Report, on the node and as a string."""

import re

from live import TOLERANCE


def report(live, **options):
    result = live.sample(report=True, **{"compiled": {"backend": "aot_eager"}, "steps": 1, **options})
    (text,) = result.history["outputs"]["report"]["text"]
    return text.splitlines()


def test_it_tells_regions_graphs_and_seconds_after_sampling(small_flux):
    lines = report(small_flux)
    assert lines[0].startswith("2 double and 3 single blocks run as 2 regions, compiled in ")
    assert lines[1] == "The last step: 5 of 5 blocks compiled"
    assert lines[2].startswith("double block region: graphs 1, graph breaks 0, ")
    # An older PyTorch keeps nothing of any backend.
    reasons = "the backend aot_eager makes no code that could be kept|PyTorch .* and newer can"
    assert re.fullmatch(f"double block region cache: off: ({reasons})", lines[3])
    assert lines[4].startswith("single block region: graphs 1, graph breaks 0, ")
    assert re.search(r" s, peak memory raised by \d+ MiB \(aot_eager, default\)$", lines[4])
    assert len(lines) == 6


def test_it_is_made_anew_each_time_and_translates_recompiles(small_flux):
    lines = report(small_flux, batch=2)
    assert "compiled again: batch size changed from 1 to 2" in lines[0]
    assert lines.count("double block region compiled again: batch size changed from 1 to 2") == 1
    assert small_flux.difference(compiled={"backend": "aot_eager"}, batch=2, steps=1) <= TOLERANCE


def test_it_tells_what_runs_eager(small_flux):
    lines = report(small_flux, patches=[("forward_hook", 1.5)])
    assert "eager: img_attn.proj (Linear) has a forward hook (double block 0)" in lines[0]


def test_a_model_that_is_not_compiled(small_flux):
    assert report(small_flux, compiled=None) == ["This MODEL does not pass through Compile Repeated Blocks."]
