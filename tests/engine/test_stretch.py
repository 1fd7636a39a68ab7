"""Stretches of a call: which blocks may rely on what was asked before an earlier one."""

from threading import Thread

from hotpath_pack.hotpath.first_run import waiting_for_others
from hotpath_pack.hotpath.stretch import Stretches, stretch


def test_a_stretch_goes_on_until_other_code_runs():
    call = Stretches()
    with call.of_this_thread():
        assert stretch() is None
        call.goes_on(True)
        first = stretch()
        call.goes_on(True)
        assert first is not None and stretch() is first
        call.goes_on(False)
        assert stretch() is None
        call.goes_on(True)
        assert stretch() not in (None, first)
    assert stretch() is None


def test_a_stretch_is_of_its_call_and_thread():
    outer, inner, seen = Stretches(), Stretches(), []
    with outer.of_this_thread():
        outer.goes_on(True)
        with inner.of_this_thread():
            assert stretch() is None
        assert stretch() is not None
        thread = Thread(target=lambda: seen.append(stretch()))
        thread.start()
        thread.join()
        with waiting_for_others() as waits:
            assert stretch() is waits
    assert seen == [None]
