"""On a CUDA device: what is compiled while the workflow loads is what the first step needs, and takes little memory."""

import pytest
import torch
from hotpath_pack.devtools import gpu_host
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.settings import CompileSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11"),
]
WIDE = dict(hidden=3072, text_width=4096, pooled_width=768)


@pytest.mark.parametrize("format", [None, "fp8_e4m3_rowwise"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic VRAM", "ordinary"])
def test_the_first_step_on_a_card_finds_ready_what_it_needs(dynamic, format, tmp_path, monkeypatch):
    """At the width of Flux.1-dev."""
    import folder_paths
    from hotpath_pack.host.compiling import compile as host_compile
    from hotpath_pack.host.compiling import regions as host_regions
    from hotpath_pack.host.compiling.when import LATER
    from hotpath_pack.host.telling.progress import NodeText
    from hotpath_pack.hotpath.region_store import RegionStore

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    # Keys of regions that another test compiled would be the same.
    regions = RegionStore(capacity=8)
    monkeypatch.setattr(host_regions, "REGIONS", regions)
    model = gpu_host.load(1, 1, torch.bfloat16, dynamic=dynamic, **WIDE)
    if format is not None:
        model = gpu_host.quantize(model, format)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        chosen = "all", "all", "error", NodeText(None), "auto"
        fast = host_compile.compile_repeated_blocks(model, CompileSettings(), *chosen, when="wait")
    gpu_host.until_ready()
    # The largest weight, and what blocks are called with.
    assert torch.cuda.max_memory_allocated() - before < 2**28
    assert torch.cuda.memory_allocated() - before < 2**20
    assert [region.stats.graphs for region in regions] == [1, 1]
    got, want = (gpu_host.sample(it, (1024, 1024), 512, steps=1) for it in (fast, model))
    assert (got - want).norm() < (0.02 if format is None else 0.2) * want.norm()
    assert [(region.stats.graphs, region.stats.recompiles) for region in regions] == [(1, [])] * 2
    LATER.wait()
    assert len(list(tmp_path.rglob("*.graphs"))) == 2
