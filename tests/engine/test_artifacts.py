"""Compiled regions on disk: found, trusted, and never half there."""

import multiprocessing
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hotpath_pack.hotpath.artifacts import Kept, Refused, Store, Stored, pack, read_bundle, unpack, write_bundle
from hotpath_pack.hotpath.environment import difference
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent.parent
STORED = Stored("a block", {"PyTorch": "2.11.0", "CPU": "fast"}, (b"one graph", b"and another"))
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no owners and modes in this form")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "kept")


def write(store, region="a block", size=1000):
    store.write(Stored(region, {}, (os.urandom(size),)))
    return store.path(region)


def test_what_is_written_is_read_with_a_short_name_for_this_user_alone(store):
    assert store.read("a block") is None
    store.write(STORED)
    assert Store(store.folder).read("a block") == STORED
    assert len(store.path("a block").name) < 30
    if sys.platform != "win32":
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (store.folder, *store.folder.iterdir())}
        assert modes == {"kept": 0o700, "key": 0o600, store.path("a block").name: 0o600}


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_bit_changed_is_refused(place, bit):
    data = bytearray(pack(STORED, b"k" * 32))
    data[int(place * len(data))] ^= 1 << bit
    for key in (b"k" * 32, None):
        if key is None and 40 <= int(place * len(data)) < 72:
            continue  # the signature, which is not asked for then
        with pytest.raises(Refused):
            unpack(bytes(data), key)


@given(part=st.floats(0, 1, exclude_max=True))
def test_any_length_cut_off_is_refused(part):
    data = pack(STORED, b"k" * 32)
    with pytest.raises(Refused, match="damaged"):
        unpack(data[: int(part * len(data))], b"k" * 32)


def test_a_file_signed_with_another_key_is_refused():
    assert unpack(pack(STORED, b"k" * 32), b"k" * 32) == STORED
    with pytest.raises(Refused, match="not written by this user's ComfyUI"):
        unpack(pack(STORED, b"k" * 32), b"j" * 32)


def test_a_file_of_another_region_is_refused(store):
    store.write(STORED)
    os.replace(store.path("a block"), store.path("another block"))
    with pytest.raises(Refused, match="is of another region"):
        store.read("another block")


@posix
@pytest.mark.parametrize("name, mode", [("", 0o777), ("", 0o720), ("key", 0o604), ("file", 0o622)])
def test_what_others_can_write_or_a_key_they_can_read_is_refused_with_the_fix(store, name, mode):
    path = write(store)
    opened = {"": store.folder, "key": store.folder / "key", "file": path}[name]
    opened.chmod(mode)
    with pytest.raises(Refused, match=f"is open to other users; run: chmod .* {opened}"):
        store.read("a block")


@posix
def test_a_link_is_refused(store, tmp_path):
    path = write(store)
    os.replace(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="is a link"):
        store.read("a block")


@posix
def test_a_file_of_another_owner_is_refused(store):
    path = write(store)
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, -1)
    with pytest.raises(Refused, match="belongs to another user"):
        store.read("a block")


def test_the_least_recently_used_go_first(store):
    files = [write(store, name) for name in ("a", "b", "c")]
    for age, path in enumerate(files):
        os.utime(path, (time.time() - 100 + age,) * 2)
    assert store.read("a") is not None
    store.limit = sum(path.stat().st_size for path in files)
    write(store, "d")
    assert [store.path(name).exists() for name in "abcd"] == [True, False, True, True]


def test_what_a_crash_left_goes_after_a_while(store):
    write(store)
    for name, age in ((".old-1.part", 7200), (".new-1.part", 0)):
        (store.folder / name).write_bytes(b"half")
        os.utime(store.folder / name, (time.time() - age,) * 2)
    write(store)
    assert [path.name for path in store.folder.glob(".*.part")] == [".new-1.part"]


WRITER = """
import sys, types
pack = types.ModuleType("hotpath_pack")
pack.__path__ = [{root!r}]
sys.modules["hotpath_pack"] = pack
from pathlib import Path
from hotpath_pack.hotpath.artifacts import Kept, Store, Stored
store = Store(Path({folder!r}))
{what}
"""


def other_process(store, what):
    code = WRITER.format(root=str(ROOT), folder=str(store.folder), what=what)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@posix
def test_a_full_disk_leaves_what_was_there_and_one_line(store):
    """A limit on the size of files fails a write midway as a full disk does."""
    store.write(STORED)
    what = (
        "import resource, logging\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "kept = Kept(store, 'a block', dict)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "kept.add(b'x' * 100_000, {})\n"
        "print(kept.state)\n"
    )
    process = other_process(store, what)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.strip() == "miss: nothing was stored yet; not stored: File too large"
    assert err.count("compiled blocks can't be stored in") == 1
    assert store.read("a block") == STORED
    assert not list(store.folder.glob(".*"))


@posix
def test_a_process_killed_while_it_writes_leaves_a_whole_file(store):
    store.write(STORED)
    what = "print(1, flush=True)\nwhile True:\n    store.write(Stored('a block', {}, (b'x' * 5_000_000,)))\n"
    process = other_process(store, what)
    process.stdout.readline()
    time.sleep(1)
    process.kill()
    process.wait()
    assert store.read("a block").graphs in (STORED.graphs, (b"x" * 5_000_000,))


def write_many(folder, letter, times):
    for _ in range(times):
        Store(folder).write(Stored("a block", {}, (letter * 200_000,)))


def test_two_processes_at_once(store):
    """They start with no key, and each sees whole files at any time."""
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "fork")
    writers = [context.Process(target=write_many, args=(store.folder, letter, 30)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        stored = store.read("a block")
        seen.add(stored and stored.graphs[0][:1])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert store.read("a block").graphs[0] in (b"a" * 200_000, b"b" * 200_000)
    assert seen <= {None, b"a", b"b"}


def test_a_bundle_of_this_user_is_taken_and_a_foreign_one_only_when_told_to(store, tmp_path):
    bundle = tmp_path / "flux.hotpath"
    size = write_bundle(bundle, [STORED], store)
    assert bundle.stat().st_size == size
    own = Store(tmp_path / "own")
    with pytest.raises(Refused, match="not written by this user's ComfyUI"):
        read_bundle(bundle, own, foreign=False)
    assert own.read("a block") is None
    assert read_bundle(bundle, own, foreign=True) == [STORED]
    assert own.read("a block") == STORED
    store.path("a block").unlink(missing_ok=True)
    assert read_bundle(bundle, store, foreign=False) == [STORED]
    bundle.write_bytes(bundle.read_bytes()[:-1])
    with pytest.raises(Refused, match="damaged"):
        read_bundle(bundle, own, foreign=True)


FACTS = st.dictionaries(st.sampled_from(["PyTorch", "GPU", "Triton", "threads", "CPU"]), st.text(max_size=5))


@given(before=FACTS, now=FACTS)
def test_exactly_a_fact_that_differs_misses_and_is_named(before, now):
    said = difference(before, now)
    assert bool(said) == (before != now)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            assert f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}" in said


def test_the_reason_is_told_in_plain_words(store):
    Kept(store, "a block", lambda: {"PyTorch": "2.11.0"}).add(b"graph", {"PyTorch": "2.11.0"})
    same, other = (Kept(store, "a block", lambda v=v: {"PyTorch": v}) for v in ("2.11.0", "2.12.0"))
    assert (same.read(), same.state) == ([b"graph"], "hit")
    assert (other.read(), other.state) == ([], "miss: PyTorch 2.11.0 -> 2.12.0")


def test_graphs_compiled_under_other_facts_are_not_stored_together(store):
    kept = Kept(store, "a block", dict)
    for version, graph in (("1", b"one"), ("1", b"two"), ("2", b"three")):
        kept.add(graph, {"PyTorch": version})
    assert store.read("a block") == Stored("a block", {"PyTorch": "2"}, (b"three",))


def test_a_damaged_file_is_one_line_and_replaced(store, caplog):
    path = write(store)
    path.write_bytes(path.read_bytes()[:100])
    kept = Kept(store, "a block", dict)
    assert kept.read() == []
    assert kept.state == "miss: the file is damaged"
    assert len(caplog.records) == 1
    kept.add(b"graph", {})
    assert store.read("a block").graphs == (b"graph",)
