"""The promise of the pack, through a live server: two graphs, no break, no recompile, and what eager gives."""

import re

from live import TOLERANCE

TWO_GRAPHS = {"graphs": 2, "breaks": 0, "recompiles": 0}

RUNS = [
    dict(steps=4),
    dict(width=320),
    dict(width=128, height=384),
    dict(width=192, height=192, tokens=5),
    dict(tokens=77),
    dict(loras=[("style.safetensors", 0.4)]),
    dict(loras=[("style.safetensors", 1.0)]),
    dict(loras=[("style.safetensors", 1.0)], patches=[("low_vram", 1.0)]),
    dict(loras=[("style.safetensors", 0.4)], patches=[("low_vram", 1.0)], width=320, tokens=9),
]


def test_two_graphs_over_sizes_prompts_loras_and_offloaded_weights(whole_flux):
    for run in RUNS:
        options = {"steps": 1, **run}
        assert whole_flux.difference(**options) <= TOLERANCE, options
        assert whole_flux.counts() == TWO_GRAPHS, options
    (model,) = whole_flux.server.report()["models"]
    assert model["compiled_blocks"] == {"double": 19, "single": 38}
    assert model["eager"] == {}
    log = whole_flux.server.log_text()
    for kind in ("double", "single"):
        assert len(re.findall(f"{kind} block region compiled (?:ahead )?in ", log)) == 1
    assert "loaded partially" in log and "lowvram patches: 0" not in log


def test_the_lora_of_these_runs_is_applied(whole_flux):
    with_lora = whole_flux.latent(loras=[("style.safetensors", 1.0)], steps=1)
    assert (with_lora - whole_flux.latent(steps=1)).abs().max() > 0.01
