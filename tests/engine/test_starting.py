"""What a compiler needs before it compiles."""

import os

import pytest
import torch
from hotpath_pack.hotpath import starting


@pytest.mark.parametrize("chosen", [None, "0"])
def test_workers_compile_kernels_of_this_pack_as_inductors_own(chosen, monkeypatch):
    """Else what is kept of a region would need Triton's compiler; what a user chose stays."""
    seen = []
    monkeypatch.setattr("torch._inductor.async_compile.maybe_warm_pool", lambda: seen.append(dict(os.environ)))
    name = "TORCHINDUCTOR_STATIC_LAUNCH_USER_DEFINED_TRITON_KERNELS"
    if chosen is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, chosen)
    before = dict(os.environ)
    starting.start_workers(torch.device("cuda"))
    assert seen[0][name] == (chosen or "1")
    assert dict(os.environ) == before
