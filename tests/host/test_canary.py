"""The table of what would run eager in a ComfyUI."""

from changes import with_activation
from hotpath_pack.devtools import canary


def test_nothing_of_a_flux_does():
    row = canary.examine("Flux.1", canary.models()["Flux.1"])
    assert row == canary.Row("Flux.1", {"double": 2, "single": 2}, {})
    assert canary.text(row.lines()).split("  ")[0] == "Flux.1" and canary.text(row.lines()).endswith("  nothing")


def test_what_is_not_known_is_named_with_its_blocks_and_what_fails_with_its_error(flux, newer):
    row = canary.examine("new", lambda: with_activation(flux, newer.Counts))
    (reason,) = row.eager
    assert row.compiled == {"single": 3} and row.eager[reason] == ["double block 0", "double block 1"]
    assert "comfy.ldm.newer.Counts changes calls" in reason

    def fails():
        raise AttributeError("no such thing\nand more")

    row = canary.examine("failing", fails)
    assert list(row.lines()) == [("failing", "none", "the model: AttributeError: no such thing")]
