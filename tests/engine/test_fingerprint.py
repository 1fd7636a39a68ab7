"""What a graph was traced with is looked at where it was found, and a change of it is seen."""

import sys

import pytest
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.fingerprint import Dependencies, Dependency, describe
from hotpath_pack.hotpath.first_run import waiting_for_others

pytestmark = pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")

DIMS = {"x": (1,)}


def twice(x):
    return x * 2


FOUND = None


@pytest.fixture(params=["alone", "with others"])
def asked(request):
    """A function that tells whether FOUND is still what it was traced as."""

    def ask(traced):
        found = Dependency(__name__, (("attribute", "FOUND"),), describe(traced))
        if request.param == "alone":
            return found.holds
        others = [Dependency(__name__, (("attribute", name),), describe(globals()[name])) for name in ("DIMS", "twice")]
        return Dependencies([others[0], found, others[1]]).hold

    return ask


@pytest.mark.parametrize("traced", [2.0, {}, []])
def test_what_became_none_is_not_what_it_was(traced, asked, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FOUND", None)
    assert not asked(traced)()
    holding = asked(traced)
    for value, holds in ((traced, True), (traced, True), (None, False), (None, False), (traced, True)):
        monkeypatch.setattr(sys.modules[__name__], "FOUND", value)
        assert holding() is holds
    monkeypatch.delattr(sys.modules[__name__], "FOUND")
    assert not holding()


@pytest.mark.parametrize(("empty", "fill", "item"), [(dict, "update", {"a": 1}), (list, "append", 1)])
def test_what_was_empty_and_was_filled_in_place_is_not_what_it_was(empty, fill, item, asked, monkeypatch):
    found = empty()
    monkeypatch.setattr(sys.modules[__name__], "FOUND", found)
    holding = asked(found)
    assert holding() and holding()
    getattr(found, fill)(item)
    assert not holding()
    found.clear()
    assert holding()


def test_it_is_asked_once_for_all_blocks_of_a_call_in_which_only_the_host_runs_between(monkeypatch):
    holding = Dependencies([Dependency(__name__, (("attribute", "FOUND"),), describe(1.0))]).hold
    monkeypatch.setattr(sys.modules[__name__], "FOUND", 1.0)
    for changed in (2.0, 1.0):
        with waiting_for_others():
            assert holding() is (FOUND == 1.0)
            monkeypatch.setattr(sys.modules[__name__], "FOUND", changed)
            assert holding() is (changed == 2.0 or FOUND == 1.0)
        assert holding() is (FOUND == 1.0)


PAIR = ({}, 1)


@pytest.mark.parametrize("place", [(("attribute", "PAIR"), ("item", 1)), (("attribute", "DIMS"), ("item", "x"))])
def test_an_item_replaced_is_not_what_it_was(place, monkeypatch):
    at = [(("attribute", "PAIR"),), (("attribute", "PAIR"), ("item", 0)), place]
    parts = [Dependency(__name__, path) for path in at]
    for part in parts:
        part.description = describe(part.value())
    holding = Dependencies(parts).hold
    assert holding() and holding()
    PAIR[0]["filled"] = True
    assert not holding()
    PAIR[0].clear()
    assert holding() and holding()
    monkeypatch.setattr(sys.modules[__name__], "PAIR", ({}, 2))
    monkeypatch.setitem(DIMS, "x", (2,))
    assert not holding()
