"""The start of ``dev.py bench --soak``: prompts of all kinds in turn on one server."""

import os
from pathlib import Path

import pytest
from hotpath_pack.devtools.soak import Soak, soak

SETTINGS = ({"backend": "aot_eager"}, {"backend": "aot_eager", "dynamic": "always"})


@pytest.mark.sweep
def test_many_prompts_are_right_and_leave_nothing_behind():
    seen = soak(Path(os.environ["COMFYUI_PATH"]), 60, SETTINGS)
    assert len(seen.rss) == 60 and seen.settled == 24
    # Of two structures, two kinds of blocks, with a patch and without: for one image, for two and for any number.
    assert 2 * 2 * 2 * (2 + 1) <= seen.graphs[-1] <= 2 * 2 * 2 * (3 + 2)
    assert seen.problems() == []


def test_what_a_soak_finds_is_named():
    bad = Soak(2, [100, 100, 200], [4, 4, 5], 1.0, 3)
    assert [problem.split()[0] for problem in bad.problems()] == ["an", "1", "memory", "3"]
    assert Soak(2, [90, 100, 104], [4, 5, 5]).problems() == []
