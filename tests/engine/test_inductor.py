"""Inductor's instruction sets are not probed, unless the compiler lacks what the processor has."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILER = """#!/bin/sh
case "$*" in *"{refused}"*) exit 1 ;; esac
exec c++ "$@"
"""
SCRIPT = """
    import sys, types
    pack = types.ModuleType("hotpath_pack")
    pack.__path__ = [{root!r}]
    sys.modules["hotpath_pack"] = pack
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from torch._inductor.cpu_vec_isa import VecISA, pick_vec_isa, valid_vec_isa_list
    import test_graphs
    from hotpath_pack.hotpath.compiled import CompileSettings, Region
    from hotpath_pack.hotpath.graphs import supported

    probed, check_build = [], VecISA.check_build
    VecISA.check_build = lambda self, code: probed.append(code) or check_build(self, code)
    made = [Region("a block", test_graphs.Block(), test_graphs.as_they_are, CompileSettings())]
    if supported():
        made.append(test_graphs.region(Path({folder!r})))
    for compiled in made:
        valid_vec_isa_list.cache_clear()
        test_graphs.run(compiled, 1)
        assert compiled.stats.graphs == 1
    print(pick_vec_isa(), bool(probed))
"""


def first_steps(folder, **env):
    """The instruction set that two regions of a new process use, one of them kept, and whether it was probed."""
    code = textwrap.dedent(SCRIPT.format(root=str(ROOT), tests=str(Path(__file__).parent), folder=str(folder / "kept")))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *used, probed = done.stdout.split()
    return " ".join(used), probed == "True"


@pytest.fixture
def widest():
    flags = x86_isa_checker()
    found = [isa for isa in supported_vec_isa_list if all(flag in flags for flag in str(isa).split())]
    if len(found) < 2:
        pytest.skip("this processor has one instruction set at the most")
    return found[0]


def test_what_the_processor_has_is_used_at_once(tmp_path, widest):
    assert first_steps(tmp_path) == (str(widest), False)


def test_a_compiler_that_lacks_it_gets_the_next(tmp_path, widest):
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(refused=widest.build_arch_flags().split()[0]), encoding="utf-8")
    compiler.chmod(0o755)
    used, probed = first_steps(tmp_path, CXX=str(compiler))
    assert probed and used != str(widest)
    assert used in map(str, supported_vec_isa_list)
