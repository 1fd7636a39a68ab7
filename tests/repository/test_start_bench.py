"""dev.py bench --start: what it tells of where the time goes."""

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
from benchmarks import start
from devtools.parts import OTHER, Parts


def function(path, name, inner=None):
    """A function of the file ``path`` that calls ``inner``, and sleeps where there is none."""

    def call(inner=inner or (lambda: time.sleep(0.06))):
        inner()

    call.__code__ = call.__code__.replace(co_filename=path, co_name=name)
    return call


def test_time_goes_to_the_innermost_part_and_all_of_storing_to_storing():
    trace = function("/torch/_dynamo/symbolic_convert.py", "run")
    lower = function("/torch/_inductor/graph.py", "run")
    wait = function("/torch/_inductor/async_compile.py", "wait", lower)
    with Parts() as parts:
        trace()
        function("/torch/_dynamo/output_graph.py", "call", lower)()
        function("/torch/_inductor/graph.py", "load", wait)()
        function("/pack/hotpath/artifacts.py", "add", trace)()
        time.sleep(0.06)
    seconds = parts.table()
    assert set(seconds) == {
        "tracing",
        "Inductor's lowering, scheduling and code",
        "kernels waited for",
        "storing",
        OTHER,
    }


def test_the_tables_have_each_side_and_its_parts():
    run = dict(first=2.0, prompt=3.0, loading=0.0, graphs=2, frames=0, processes=1, difference=1e-6)
    seen = {"ours, cold": [{**run, "parts": {"MainThread": {"tracing": 1.5, "guards": 0.01}}}], "eager": [run]}
    seen["eager"][0] = {**run, "first": 0.5, "parts": {"MainThread": {OTHER: 0.5}}}
    assert [name for name, _ in start.rows(seen)] == ["", "ours, cold", "eager"]
    assert "0.250" in start.rows(seen)[2][1]
    assert [name.strip() for name, _ in start.parts(seen)] == [
        "ours, cold, MainThread",
        "tracing",
        "eager, MainThread",
        OTHER,
    ]
