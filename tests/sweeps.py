"""Which tests run when, and how long a file of them may take.

A sweep is a test, or one of its many cases, that repeats for another model, format or seed what a case that always runs
shows. ``--all`` runs all of them, ``--turn N`` one part of them, so that each has run after as many turns as there are.
"""

from collections import Counter
from zlib import crc32

import pytest

TURNS = 8


def add_options(parser):
    group = parser.getgroup("hotpath")
    group.addoption("--all", action="store_true", help="run each test, the sweeps too")
    group.addoption("--turn", type=int, help=f"run the sweeps of this turn, one of {TURNS} after each other")
    parser.addini("budget", "seconds that the tests of a file may take", default="60")
    parser.addini("budgets", "a file and its seconds a line, for those that may take more", "linelist", default=[])


def _budgets(config):
    return {file: float(seconds) for file, seconds in (line.rsplit(maxsplit=1) for line in config.getini("budgets"))}


def longest_first(config, items):
    """So that in the end no worker is left with a file that takes minutes; xdist itself goes by the number of tests."""
    budgets = _budgets(config)
    items.sort(key=lambda item: -budgets.get(item.nodeid.partition("::")[0], 0))


def is_sweep(item):
    """``sweep`` marks all cases of a test, ``sweep(keep=[...])`` all but those, by their ids."""
    mark = item.get_closest_marker("sweep")
    if mark is None:
        return False
    keep = mark.kwargs.get("keep", ())
    return not keep or item.callspec.id not in keep


def _refuse_unknown(items):
    """A case to keep that is none would be a test that never runs."""
    ids, keeps = {}, {}
    for item in items:
        mark = item.get_closest_marker("sweep")
        if mark is not None and mark.kwargs.get("keep"):
            test = item.nodeid.partition("[")[0]
            ids.setdefault(test, set()).add(item.callspec.id)
            keeps[test] = set(mark.kwargs["keep"])
    wrong = {test: sorted(keep - ids[test]) for test, keep in keeps.items() if keep - ids[test]}
    if wrong:
        raise pytest.UsageError(f"sweep(keep=...) names cases that are none: {wrong}")


def choose(config, items):
    """Take out the sweeps that are not due. Whoever names a test wants it."""
    named = config.option.keyword or any("::" in argument for argument in config.args)
    if config.option.all or named:
        return
    _refuse_unknown(items)
    sweeps = [item for item in items if is_sweep(item)]
    turn = config.option.turn
    due = set() if turn is None else set(sweeps[turn % TURNS :: TURNS])
    left_out = set(sweeps) - due
    config.hook.pytest_deselected(items=[item for item in sweeps if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def has_its_turn(config, name):
    """Whether what is called ``name`` is due, of many alike that share the turns."""
    turn = config.option.turn
    return config.option.all or (turn is not None and crc32(name.encode()) % TURNS == turn % TURNS)


def header(config):
    turn = config.option.turn
    if config.option.all:
        return "sweeps: all"
    return "sweeps: none (--all runs them)" if turn is None else f"sweeps: turn {turn % TURNS + 1} of {TURNS}"


def summarize(reporter, config):
    """Files that took longer than they may; machines differ, so that this fails nothing."""
    budgets = _budgets(config)
    took = Counter()
    for report in (report for reports in reporter.stats.values() for report in reports):
        if hasattr(report, "duration") and hasattr(report, "when"):
            took[report.nodeid.partition("::")[0]] += report.duration
    limits = {file: budgets.get(file, float(config.getini("budget"))) for file in took}
    over = [(file, seconds) for file, seconds in took.most_common() if seconds > limits[file]]
    if over and not config.option.all:
        reporter.section("over their budget")
        for file, seconds in over:
            reporter.write_line(f"{file}: {seconds:.0f} s of {limits[file]:.0f}")
