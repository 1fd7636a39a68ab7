"""Faults on a live server: the prompt ends as chosen, and the server and the MODEL go on."""

import time

import pytest
from hotpath_pack.devtools.server import STATUS, PromptFailed, PromptInterrupted
from hotpath_pack.devtools.workflows import sampling
from live import TOLERANCE, serve


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("host"), 2, 3, CXX="no-such-compiler") as live:
        yield live


def test_without_a_compiler_the_prompt_goes_on_and_the_node_says_what_to_install(without_compiler):
    eager = without_compiler.latent(steps=2)
    result = without_compiler.sample(compiled={"on_failure": "eager"}, steps=2)
    assert (without_compiler.server.latent(result) - eager).abs().max() == 0
    told = [text for node, text in result.texts if node == "compile"]
    assert len(told) == 1
    assert "no C++ compiler was found" in told[0] and "Install g++" in told[0]
    assert "no C++ compiler was found" in without_compiler.server.log_text()


def test_or_it_ends_with_that_error_and_the_next_one_runs(without_compiler):
    with pytest.raises(PromptFailed, match="no C\\+\\+ compiler was found"):
        without_compiler.sample(compiled={"on_failure": "error"}, steps=2, seed=5)
    assert without_compiler.difference(compiled={"backend": "eager"}, steps=2) <= TOLERANCE


@pytest.mark.parametrize(
    "backend, says",
    [("hotpath_dev_faulty", "no such kernel"), ("hotpath_dev_out_of_memory", "out of memory while autotuning")],
)
def test_a_backend_that_fails_and_one_that_runs_out_of_memory(small_flux, backend, says):
    said = f"the double block region could not be compiled: {says}"
    eager = small_flux.latent(steps=2)
    result = small_flux.sample(compiled={"backend": backend, "on_failure": "eager"}, steps=2)
    assert (small_flux.server.latent(result) - eager).abs().max() == 0
    assert said in [text for node, text in result.texts if node == "compile"][-1]
    assert said in small_flux.server.log_text()
    with pytest.raises(PromptFailed, match=said):
        small_flux.sample(compiled={"backend": backend, "on_failure": "error"}, steps=2)
    assert small_flux.difference(compiled={"backend": "eager"}, steps=2) <= TOLERANCE


def test_an_interrupt_while_compiling_leaves_the_next_prompt_in_the_queue_alone(small_flux):
    server, queued = small_flux.server, []

    def interrupt(event):
        if event.type == STATUS and "compiling double block" in event.data["text"] and not queued:
            following = sampling(small_flux.checkpoint, small_flux.flux, steps=2, compiled={}, seed=3)
            queued.append(server.post(following))
            server.interrupt()

    first = sampling(small_flux.checkpoint, small_flux.flux, steps=2, compiled={}, seed=2)
    with pytest.raises(PromptInterrupted):
        server.run(first, interrupt)
    deadline = time.monotonic() + 300
    while queued[0] not in (history := server.get("/history")):
        assert time.monotonic() < deadline, "the queued prompt did not end"
        time.sleep(0.5)
    assert history[queued[0]]["status"]["status_str"] == "success"
    assert small_flux.difference(steps=2, seed=3) <= TOLERANCE
