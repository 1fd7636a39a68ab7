import getpass
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hotpath_pack.hotpath import preflight, toolchain
from hotpath_pack.hotpath.failures import reason_of
from hotpath_pack.hotpath.internals import compiler
from hotpath_pack.hotpath.reasons import first_useful_line, plain_reason


def test_this_machine_can_compile_for_its_cpu():
    assert preflight.compile_problems("inductor", torch.device("cpu")) == []


def test_a_missing_cpp_compiler_is_named_with_the_fix():
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        (problem,) = preflight.compile_problems("inductor", torch.device("cpu"))
    assert "no C++ compiler was found" in problem and "set CXX" in problem


def test_torch_compile_switched_off_is_named():
    with torch._dynamo.config.patch(disable=True):
        for backend in ("inductor", "aot_eager"):
            (problem,) = preflight.compile_problems(backend, torch.device("cpu"))
            assert "torch.compile is switched off" in problem


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (problem,) = preflight.compile_problems("inductor", torch.device("cpu"))
    assert "can't be written. Set TORCHINDUCTOR_CACHE_DIR" in problem


def test_a_path_too_long_for_windows(tmp_path):
    assert "too long a path for Windows" in preflight._cache_problem(Path("C:/" + "x" * 90), "win32")
    assert preflight._cache_problem(tmp_path, "linux") is None


def test_a_space_in_the_path_is_named_where_inductor_stumbles_over_it(tmp_path):
    odd = tmp_path / "a b" / "\u65e5\u672c"
    assert "has a space in its path" in preflight._spaces_problem("linux", tmp_path, odd)
    assert preflight._spaces_problem("linux", tmp_path / "\u65e5\u672c") is None
    assert preflight._spaces_problem("win32", odd) is None


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)
    assert "is full. Make room" in preflight._cache_problem(tmp_path, "linux")


def test_a_compiler_that_has_left_the_path_is_named(monkeypatch):
    assert preflight._cpp_problem() is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "no C++ compiler was found" in preflight._cpp_problem()
    monkeypatch.undo()
    compiler.forget_toolchain()
    assert preflight._cpp_problem() is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no passwd")
def test_a_user_without_a_name_gets_one_for_as_long_as_it_is_needed(monkeypatch):
    import pwd

    def gone(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", gone)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    with toolchain.named_user():
        assert getpass.getuser() == str(os.getuid())
    assert "USER" not in os.environ
    assert preflight.compile_problems("inductor", torch.device("cpu")) == []


@pytest.mark.parametrize(
    "output, line",
    [
        (
            b"In file included from x.h\nx.cpp:1:1: fatal error: omp.h: No such file or directory\n",
            "fatal error: omp.h",
        ),
        ("x.cpp:1: Fehler: \u00fcber\ng++: error: nein".encode("latin-1"), "g++: error: nein"),
        (b"as: No space left on device\n", "No space left on device"),
    ],
)
def test_a_compilers_own_first_useful_line_is_the_reason(output, line):
    try:
        try:
            raise subprocess.CalledProcessError(1, "g++", output=output)
        except subprocess.CalledProcessError:
            output.decode("utf-8")
            raise
    except (subprocess.CalledProcessError, UnicodeDecodeError) as error:
        said = first_useful_line(error)
    assert said.startswith("the compiler says: ") and line in said and "C++ compile error" not in said


def test_the_reason_of_a_full_disk():
    assert first_useful_line(OSError(28, "No space left on device", "/tmp/x")) == (
        "no space is left on the disk for /tmp/x"
    )


def test_what_hangs_on_a_size_that_may_be_any_is_told_in_plain_words():
    def decides(x):
        found = x.nonzero().shape[0]
        return x * 2 if found == 3 else x

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        with pytest.raises(Exception, match="data-dependent") as raised:
            torch.compile(decides, backend="eager", fullgraph=True)(torch.ones(4))
    torch._dynamo.reset()
    said = reason_of(raised.value)
    assert said.startswith("sizes that may be any decide what it computes (dynamic: 'auto'") and "Eq(" not in said


@pytest.mark.parametrize("system, package", [("win32", "triton-windows"), ("linux", "triton")])
def test_missing_triton(system, package):
    assert preflight._triton_problem(system, installed=False).endswith(f"Install the package {package}")


def test_triton_needs_a_c_compiler(monkeypatch):
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    assert "no C compiler was found" in preflight._triton_problem("linux", installed=True)
    assert preflight._triton_problem("win32", installed=True) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can launch here")
def test_triton_that_cannot_launch():
    problem = preflight._launch_problem()
    assert problem.startswith("Triton can't launch kernels here (") and "install Python's headers" in problem


@pytest.mark.gpu
def test_triton_that_can():
    assert preflight.compile_problems("inductor", torch.device("cuda")) == []


def test_a_gpu_too_old_for_triton():
    assert "compute capability 7.0 or later and this one has 6.1" in preflight._capability_problem((6, 1))
    assert preflight._capability_problem((7, 0)) is None


def test_fp8_on_a_gpu_that_lacks_it():
    problem = preflight._fp8_problem((8, 6), [torch.bfloat16, torch.float8_e4m3fn])
    assert "compute capability 8.9 or later and this one has 8.6" in problem and "bf16 or int8" in problem
    assert preflight._fp8_problem((8, 6), [torch.bfloat16]) is None
    assert preflight._fp8_problem((8, 9), [torch.float8_e4m3fn]) is None


@pytest.mark.parametrize(
    "dynamo, plain",
    [
        ("tensor 'inputs['img']' size mismatch at index 0. expected 1, actual 2", "batch size changed from 1 to 2"),
        ("tensor 'L['inputs']['x']' size mismatch at index 2. expected 8, actual 9", "size 2 of x changed from 8 to 9"),
        (
            "tensor 'weights['linear.weight']' dtype mismatch. expected Float, actual Half",
            "dtype of linear.weight changed",
        ),
        ("len(L['inputs']['vec']) == 3", "vec holds another number of values"),
        ("2 <= L['inputs']['img'].size()[0]  # x += y", "batch size changed to 1"),
        ("L['inputs']['img'].stride()[0] == 12", "img lies in memory in another order"),
        ("GLOBAL_STATE changed: grad_mode ", "whether PyTorch records gradients changed"),
        ("___check_obj_id(G['thing'], 1234)", "thing is of another kind than before"),
        ("", "something that the code was compiled for is not as it was"),
    ],
)
def test_reasons_are_translated(dynamo, plain):
    assert plain_reason(dynamo) == plain
