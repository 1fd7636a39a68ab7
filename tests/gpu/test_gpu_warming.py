"""On a CUDA device: what is compiled while the workflow loads is what the first step needs, and takes little memory."""

import folder_paths
import pytest
import torch
from hotpath_pack.devtools import gpu_host
from hotpath_pack.host import warming
from hotpath_pack.host.compile import REGIONS, compile_repeated_blocks
from hotpath_pack.host.progress import NodeText
from hotpath_pack.host.when import LATER
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.settings import CompileSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11"),
]
WIDE = dict(hidden=3072, text_width=4096, pooled_width=768)


def test_the_first_step_on_a_card_finds_ready_what_it_needs(tmp_path, monkeypatch):
    """At the width of Flux.1-dev, with dynamic VRAM."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    model = gpu_host.load(1, 1, torch.bfloat16, **WIDE)
    known = set(REGIONS)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        chosen = "all", "all", "error", NodeText(None), "auto"
        fast = compile_repeated_blocks(model, CompileSettings(), *chosen, when="wait")
    warming.until_ready()
    assert torch.cuda.max_memory_allocated() - before < 2**28
    assert torch.cuda.memory_allocated() - before < 2**20
    made = [region for region in REGIONS if region not in known]
    assert [region.stats.graphs for region in made] == [1, 1]
    got, want = (gpu_host.sample(it, (1024, 1024), 512, steps=1) for it in (fast, model))
    assert (got - want).norm() < 0.02 * want.norm()
    assert [region.stats.graphs for region in made] == [1, 1]
    assert {region for region in REGIONS if region not in known} == set(made)
    LATER.wait()
    assert len(list(tmp_path.rglob("*.graphs"))) == 2
