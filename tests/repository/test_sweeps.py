"""Every case runs after as many turns as there are, and a mistake in a mark is told."""

import pytest
from sweeps import TURNS

pytest_plugins = ["pytester"]

CONFTEST = """
import sweeps

def pytest_addoption(parser):
    sweeps.add_options(parser)

def pytest_collection_modifyitems(config, items):
    sweeps.choose(config, items)
    sweeps.longest_first(config, items)

def pytest_terminal_summary(terminalreporter, config):
    sweeps.summarize(terminalreporter, config)
"""
CASES = """
import pytest

@pytest.mark.sweep(keep=["3"])
@pytest.mark.parametrize("number", range(20))
def test_numbers(number):
    pass

@pytest.mark.sweep
def test_whole():
    pass

def test_always():
    pass
"""
ALWAYS = {"test_numbers[3]", "test_always"}
EVERY = {f"test_numbers[{number}]" for number in range(20)} | {"test_whole", "test_always"}


@pytest.fixture
def run(pytester):
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nbudget = 0\nmarkers =\n    sweep\n")

    def run(*arguments, cases=CASES):
        pytester.makepyfile(test_cases=cases)
        done = pytester.runpytest_inprocess(*arguments)
        return "\n".join(done.outlines + done.errlines)

    return run


def collected(out):
    return {line.partition("::")[2] for line in out.splitlines() if "::" in line}


def test_each_sweep_runs_in_one_of_the_turns_and_with_all(run):
    assert collected(run("--co", "-q")) == ALWAYS
    assert collected(run("--co", "-q", "--all")) == EVERY
    turns = [collected(run("--co", "-q", "--turn", str(turn))) - ALWAYS for turn in range(7, 7 + TURNS)]
    assert set().union(*turns) == EVERY - ALWAYS and sum(map(len, turns)) == len(EVERY - ALWAYS)


def test_who_names_a_sweep_runs_it(run):
    assert collected(run("--co", "-q", "-k", "whole")) == {"test_whole"}
    assert collected(run("--co", "-q", "test_cases.py::test_numbers")) == EVERY - {"test_whole", "test_always"}


def test_a_case_to_keep_that_is_none_is_an_error(run):
    assert "none: {'test_cases.py::test_numbers': ['x']}" in run(cases=CASES.replace('"3"', '"x"'))


def test_a_file_over_its_budget_is_told(run):
    assert "test_cases.py: 0 s of 0" in run()
    assert "over their budget" not in run("--all")


def test_the_files_that_may_take_longest_start_first(pytester, run):
    pytester.makeini("[pytest]\nmarkers =\n    sweep\nbudgets =\n    test_short.py 70\n    test_long.py 200\n")
    pytester.makepyfile(test_long="def test_it(): pass", test_short="def test_it(): pass")
    files = [line.partition("::")[0] for line in run("--co", "-q").splitlines() if "::" in line]
    assert list(dict.fromkeys(files)) == ["test_long.py", "test_short.py", "test_cases.py"]
