"""``when``: ``background``. Prompts sample eager until another process has compiled, and never change within."""

import sys

import pytest
import torch
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.compiling import behind
from hotpath_pack.host.compiling.behind import Helper
from hotpath_pack.host.compiling.compile import compile_repeated_blocks
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.compiled import Region
from hotpath_pack.hotpath.settings import CompileSettings
from sampling import TOLERANCE, Counting, Texts, compiled_blocks, load, sample

pytestmark = [
    pytest.mark.usefixtures("user_folder"),
    pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals stand in for what may befall a process"),
]
WAITING = "a helper process compiles it, and this prompt samples without"


@pytest.fixture
def helper(monkeypatch):
    """A helper of this test alone."""
    made = Helper()
    monkeypatch.setattr(behind, "HELPER", made)
    yield made
    made.wait()


def background(model, cache="auto", **settings):
    with torch.inference_mode():
        return compile_repeated_blocks(
            model, CompileSettings(**settings), "all", "all", "error", Texts(), cache, when="background"
        )


def test_prompts_sample_eager_until_it_is_compiled_and_compiled_after(helper):
    model = load(checkpoints.flux1(1, 1))
    want, fast = sample(model), background(model)
    blocks = compiled_blocks(fast)
    with Counting() as counting:
        assert torch.equal(sample(fast), want)
        assert list(blocks.eager) == [WAITING]
        helper.wait()
        assert (sample(fast) - want).abs().max() <= TOLERANCE
        assert not blocks.eager and blocks.summary().startswith("1 double and 1 single blocks run as 2 regions, loaded")
        for change in (dict(width=96), dict(tokens=5)):
            assert (sample(fast, **change) - sample(model, **change)).abs().max() <= TOLERANCE
    assert counting.graphs == 0 and helper.process is None


class Told:
    """A helper that has done what a test says."""

    def __init__(self):
        self.asked, self.states = [], {}

    def ask(self, key, job):
        self.asked.append(job().name)
        self.states.setdefault(key, ("waiting", ""))

    def state(self, key):
        return self.states.get(key, ("", ""))


def test_nothing_changes_within_a_prompt(monkeypatch):
    """Though the code is there before its second step."""
    told = Told()
    monkeypatch.setattr(behind, "HELPER", told)
    model = load(checkpoints.flux1(1, 1))
    fast = background(model)
    blocks, found, steps = compiled_blocks(fast), [], []
    monkeypatch.setattr(Region, "find", lambda self, weights, inputs: bool(found))

    def later(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        steps.append(list(blocks.eager))
        found.append(True)
        return out

    until = fast.clone()
    until.add_wrapper_with_key("predict_noise", "a test", later)
    want = sample(model, steps=4)
    assert torch.equal(sample(until, steps=4), want)
    assert steps == [[WAITING]] * 4 and set(told.asked) == {"double block", "single block"}


@pytest.mark.parametrize(
    "program, reason",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "(status -9)"),
        ("import time; time.sleep(60)", "(status -9)"),
        ("raise OSError('No space left on device')", "(status 1): OSError: No space left on device"),
        ("import json, sys; sys.stdin.buffer.read(99); print(json.dumps(dict(failed='it is full')))", "it is full"),
    ],
    ids=["killed", "hung", "failing", "full"],
)
def test_a_helper_that_dies_or_hangs_costs_nothing_but_speed(program, reason, helper, monkeypatch):
    """It is tried once more, and then no more."""
    monkeypatch.setattr(behind, "_BEGIN", program)
    helper.seconds = 2
    model = load(checkpoints.flux1(1, 0))
    want, fast = sample(model), background(model)
    for _ in range(3):
        assert torch.equal(sample(fast), want)
        helper.wait()
    assert torch.equal(sample(fast), want)
    (told,) = compiled_blocks(fast).eager
    assert told.startswith("it was not compiled in the background: ") and told.endswith(reason)
    assert helper.process is None and [asked.tries for asked in helper._asked.values()] == [2]


@pytest.mark.parametrize(
    "change, message",
    [(dict(cache="off"), "Set cache to 'auto'"), (dict(backend="aot_eager"), "not possible here, as the backend")],
)
def test_what_can_not_be_kept_can_not_be_compiled_in_the_background(change, message, flux):
    with pytest.raises(ValueError, match=message):
        background(flux, **change)
