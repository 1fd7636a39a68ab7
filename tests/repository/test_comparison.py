"""dev.py bench: what it makes of its measurements."""

import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.compare import EVENTS, ROOT, Comparison, Event, Side, picture, problems, table
from benchmarks.tables import comparison


@pytest.fixture
def measured():
    """What a full run might give."""

    def side(first, graphs, step, added):
        events = {name: Event(0.0 if group == "LoRA" else added, graphs) for name, (group, _) in EVENTS.items()}
        return Side([1.0, 1.2], [first, first * 1.1], [first], graphs, [2**20], [step, step * 1.01], events)

    return Comparison(
        (19, 38),
        False,
        {},
        {
            "eager": side(0.1, 0, 0.10, 0.0),
            "whole model": side(60.0, 9, 0.10, 50.0),
            "per block": side(20.0, 13, 0.11, 9.0),
            "diffusers": side(21.0, 12, 0.10, 9.0),
            "ours": side(15.0, 2, 0.10, 0.01),
        },
    )


def test_what_does_not_hold_is_said(measured):
    assert problems(measured) == []
    ours = measured.sides["ours"]
    for worse, message in (
        (replace(ours, graphs=3), "ours made 3 graphs"),
        (replace(ours, cold=[25.0, 26.0]), "takes 2.41 times as long, and not 3 times"),
        (replace(ours, cold=[25.0, 26.0]), "the first step is slower than with per block"),
        (replace(ours, events={name: Event(0.2, 2) for name in EVENTS}), "three sizes added 3.6% of the first step"),
        (replace(ours, steps=[0.104]), "a steady step takes 3.5% more than eager's"),
        (replace(ours, largest_difference=2e-4), "ours differs from eager by 2.0e-04"),
    ):
        measured.sides["ours"] = worse
        assert any(message in problem for problem in problems(measured)), problems(measured)


def test_the_table_and_the_picture_have_all_sides(measured):
    lines = table(measured).splitlines()
    assert {line.count("|") for line in lines} == {7} and len(lines) > len(EVENTS)
    texts = {element.text for element in ElementTree.fromstring(picture(measured)).iter()}
    assert {"whole model", "per block", "diffusers", "ours", "17 s, 2 graphs"} < texts


def test_the_picture_and_the_machine_are_those_of_what_was_measured():
    seen = comparison()
    kept = ROOT / "benchmarks" / "results" / "sides_19_38.svg"
    assert kept.read_text(encoding="utf-8") == picture(seen)
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(seen.machine[name] in page for name in ("CPU", "Python", "ComfyUI", "diffusers"))
