"""On a CUDA device: what one process compiles, the next loads, with its Triton kernels and without a compiler."""

import re

import pytest
from hotpath_pack.devtools.gpu_start import start
from hotpath_pack.hotpath import graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11"),
]


@pytest.mark.parametrize("kind, tolerance", [("fp32", 1e-5), ("int8_tensorwise", 0.05), ("wide", 0.02)])
def test_the_second_start_compiles_nothing_and_starts_no_process(tmp_path, kind, tolerance):
    """Each with compiler caches of its own, where Triton builds a module for the driver if it compiles at all."""
    user = tmp_path / "user"
    first = start(tmp_path / "first", user, kind)
    assert (first["graphs"], first["states"]) == (2, ["miss: nothing was stored yet"]) and first["kernels timed"]
    assert first["need Triton"] == {}
    second = start(tmp_path / "second", user, kind)
    assert (second["graphs"], second["frames"], second["states"]) == (0, 0, ["hit"])
    assert max(first["differences"] + second["differences"]) < tolerance
    generated = "".join(path.read_text() for path in (tmp_path / "second").rglob("*.py"))
    assert not re.findall(r"^def \w+", generated, re.MULTILINE), "Inductor generated code"
    assert second["loading"] < 1
    assert second["processes"] == [] and not second["kernels timed"]
