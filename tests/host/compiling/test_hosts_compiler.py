"""The host's own compiler, of which the host that tests run on has no more than what is put there: its switch."""

import threading

import pytest
from comfy.cli_args import args
from comfy.patcher_extension import WrappersMP
from hotpath_pack.host.compiling.hosts_compiler import hosts_compiler_off
from sampling import compiled, sample


def entered(model, failing=False):
    """Sample, and give what the switch was when the host entered the model."""
    seen = []

    def look(executor, *given, **named):
        seen.append(getattr(args, "disable_comfy_compiler", None))
        if failing:
            raise RuntimeError("within the model")
        return executor(*given, **named)

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", look)
    try:
        sample(watched, steps=2)
    except RuntimeError:
        assert failing
    return set(seen)


def test_it_is_off_where_our_blocks_run_and_there_alone(flux, monkeypatch):
    monkeypatch.setattr(args, "disable_comfy_compiler", False, raising=False)
    assert entered(flux) == {False}
    assert entered(compiled(flux)) == {True}
    assert args.disable_comfy_compiler is False
    assert entered(compiled(flux), failing=True) == {True}
    assert args.disable_comfy_compiler is False


def test_a_users_own_choice_stays(flux, monkeypatch):
    monkeypatch.setattr(args, "disable_comfy_compiler", True, raising=False)
    assert entered(compiled(flux)) == {True}
    assert args.disable_comfy_compiler is True


def test_a_host_without_it_gets_no_switch(flux):
    if hasattr(args, "disable_comfy_compiler"):
        pytest.skip("this ComfyUI has a compiler")
    assert entered(compiled(flux)) == {None}


def test_threads_that_overlap_leave_it_as_it_was(monkeypatch):
    monkeypatch.setattr(args, "disable_comfy_compiler", False, raising=False)
    inside, seen = threading.Barrier(8), []

    def call():
        for _ in range(50):
            with hosts_compiler_off():
                inside.wait(30)
                seen.append(args.disable_comfy_compiler)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [True] * 400
    assert args.disable_comfy_compiler is False
