"""Starts of ComfyUI after the first, through live servers that share a user folder."""

import shutil
import sys
from contextlib import contextmanager

import pytest
from hotpath_pack.devtools.server import PromptFailed
from hotpath_pack.devtools.workflows import sampling
from hotpath_pack.hotpath import graphs
from live import TOLERANCE, serve

NOTHING_COMPILED = {"graphs": 0, "breaks": 0, "recompiles": 0}
pytestmark = [
    pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11"),
    pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for the compiler"),
]


def compile_and_save(live, **options):
    """A prompt that has compiled, stored and saved what it needs."""
    workflow = sampling(live.checkpoint, live.flux, compiled={}, **options)
    workflow["save_blocks"] = {
        "class_type": "HotPathSaveCompiledBlocks",
        "inputs": {"model": ["compile", 0], "filename_prefix": "compiled_blocks/flux", "after": ["sampler", 0]},
    }
    return live.server.run(workflow)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a server that has compiled, its latents, and the file that it saved of that."""
    base = tmp_path_factory.mktemp("host")
    with serve(base, 2, 3) as live:
        assert live.counts() == NOTHING_COMPILED
        (told,) = compile_and_save(live, steps=2).history["outputs"]["save_blocks"]["text"]
        assert told.split(": ")[1].startswith("2 regions, 2 graphs, ")
        assert live.counts() == {"graphs": 2, "breaks": 0, "recompiles": 0}
        states = {region["cache"] for region in live.server.report()["regions"]}
        assert states == {"miss: nothing was stored yet"}
    return base


@contextmanager
def next_start(base, tmp_path, blocks=(2, 3), **env):
    """A server on the folder of an earlier one, where every compiler that starts leaves a line."""
    started, compiler = tmp_path / "started", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {started}\nexit 1\n')
    compiler.chmod(0o755)
    tools = {"CXX": str(compiler), "CC": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    with serve(base, *blocks, **{**tools, **env}) as live:
        yield live, lambda: started.read_text() if started.exists() else ""


def states(live):
    return {region["name"]: region["cache"] for region in live.server.report()["regions"]}


def test_the_second_start_compiles_nothing_and_starts_no_compiler(first, tmp_path):
    with next_start(first, tmp_path) as (live, compilers):
        texts = [text for node, text in live.sample(compiled={}, steps=2).texts if node == "compile"]
        assert len(texts) == 1
        assert texts[0].startswith("2 double and 3 single blocks run as 2 regions, loaded in ")
        for options in (dict(), dict(width=320), dict(tokens=40, seed=5), dict(loras=[("style.safetensors", 0.7)])):
            assert live.difference(steps=2, **options) <= TOLERANCE
        assert live.counts() == NOTHING_COMPILED
        assert compilers() == ""
        assert states(live) == {"double block": "hit", "single block": "hit"}
        regions = live.server.report()["regions"]
        assert all(region["loaded"] == 1 and region["seconds"] == 0 for region in regions)
        workflow = sampling(live.checkpoint, live.flux, steps=2, compiled={}, report=True)
        (text,) = live.server.run(workflow).history["outputs"]["report"]["text"]
        assert "double block region cache: hit, 1 graphs loaded in " in text


@pytest.mark.sweep
def test_a_later_start_compiles_nothing_for_quantized_blocks(tmp_path):
    """Their code imports where it is used what no server has imported at its start."""
    wants = {}
    with serve(tmp_path / "host", 1, 1) as live:
        for format in ("int8_dynamic", "fp8_e4m3_rowwise", "int4_weight_only"):
            wants[format] = live.server.latent(compile_and_save(live, quantized=format, steps=1))
    # One at a time, as a user has one.
    for format, want in wants.items():
        with next_start(tmp_path / "host", tmp_path, blocks=(1, 1)) as (live, compilers):
            got = live.server.latent(live.sample(quantized=format, compiled={}, steps=1))
            assert (set(states(live).values()), live.counts(), compilers()) == ({"hit"}, NOTHING_COMPILED, ""), format
            assert (got - want).abs().max() <= TOLERANCE, format


def test_off_neither_looks_for_it_nor_stores_it(first, tmp_path):
    with next_start(first, tmp_path) as (live, _):
        with pytest.raises(PromptFailed, match="no C\\+\\+ compiler was found"):
            live.sample(compiled={"cache": "off"}, steps=2)
        assert states(live) == {"double block": "off"}


def test_a_setting_that_differs_is_named(first, tmp_path):
    base = tmp_path / "host"
    shutil.copytree(first / "user", base / "user")
    with next_start(base, tmp_path, TORCHINDUCTOR_FREEZING="1") as (live, _):
        result = live.sample(compiled={"on_failure": "eager"}, steps=2)
        assert (live.server.latent(result) - live.latent(steps=2)).abs().max() <= TOLERANCE
        assert live.counts() == NOTHING_COMPILED
        assert set(states(live).values()) == {live.server.report()["regions"][0]["cache"]}
        assert states(live)["double block"].startswith("miss: settings of torch.compile ")


def load_blocks(live, file, trust=False):
    workflow = sampling(live.checkpoint, live.flux, steps=2, compiled={})
    inputs = {"model": workflow["compile"]["inputs"]["model"], "file": file, "trust_foreign": trust}
    workflow["load_blocks"] = {"class_type": "HotPathLoadCompiledBlocks", "inputs": inputs}
    workflow["compile"]["inputs"]["model"] = ["load_blocks", 0]
    return live.server.run(workflow)


def test_a_file_on_another_machine_is_refused_until_its_maker_is_trusted(first, tmp_path):
    """Another user folder, and so another key."""
    saved = next((first / "output" / "compiled_blocks").iterdir())
    base = tmp_path / "host"
    for folder in ("models", "output"):
        (base / folder / "compiled_blocks").mkdir(parents=True)
        shutil.copy(saved, base / folder / "compiled_blocks" / f"{folder}.hotpath")
    with next_start(base, tmp_path) as (live, compilers):
        with pytest.raises(PromptFailed, match="not written by this user's ComfyUI. A file of compiled blocks is a"):
            load_blocks(live, "models.hotpath")
        with pytest.raises(PromptFailed, match="clients of ComfyUI's HTTP API can upload to"):
            load_blocks(live, "output.hotpath", trust=True)
        for name in ("../../../etc/passwd", "/etc/passwd", "nothing.hotpath"):
            with pytest.raises(PromptFailed, match="not in list"):
                load_blocks(live, name, trust=True)
        result = load_blocks(live, "models.hotpath", trust=True)
        (told,) = result.history["outputs"]["load_blocks"]["text"]
        assert told == "models.hotpath: 2 regions, 2 graphs are ready for Compile Repeated Blocks"
        assert "were loaded without a check of who made them" in live.server.log_text()
        assert (live.server.latent(result) - live.latent(steps=2)).abs().max() <= TOLERANCE
        assert live.counts() == NOTHING_COMPILED and compilers() == ""


def test_what_cannot_be_saved_is_named(small_flux):
    def save(**inputs):
        workflow = sampling(small_flux.checkpoint, small_flux.flux, steps=1, compiled={"backend": "aot_eager"})
        model = {"model": ["compile", 0], "filename_prefix": "compiled_blocks/x", "after": ["sampler", 0]}
        workflow["save_blocks"] = {"class_type": "HotPathSaveCompiledBlocks", "inputs": {**model, **inputs}}
        return small_flux.server.run(workflow)

    with pytest.raises(PromptFailed, match="off: the backend aot_eager makes no code that could be kept"):
        save()
    with pytest.raises(PromptFailed, match="does not pass through Compile Repeated Blocks"):
        save(model=["model", 0])
    assert not list((small_flux.server.base / "output").rglob("*.hotpath"))
