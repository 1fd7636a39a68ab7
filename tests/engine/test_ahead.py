import pytest
import torch
from hotpath_pack.hotpath.ahead import Table, content_key
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_key_is_every_bit_of_the_content(dtype):
    vector = torch.randn(2, 8, dtype=dtype)
    assert content_key(vector) == content_key(vector.clone()) == content_key(vector.t().contiguous().t())
    zeros = torch.zeros(1, 8, dtype=dtype)
    keys = {content_key(vector), content_key(vector[:1]), content_key(vector[0]), content_key(zeros)}
    assert len(keys | {content_key(-zeros)}) == 5, "0.0 and -0.0 are equal numbers of other bits"
    nearest = vector.clone()
    nearest[1, 7] = torch.nextafter(nearest[1, 7].float(), torch.tensor(9.0)) if dtype == torch.float32 else 9.0
    assert content_key(nearest) not in keys
    assert content_key(vector.view(torch.int16)) not in keys


def test_a_key_of_an_inference_tensor():
    with torch.inference_mode():
        vector = torch.arange(4.0)
    assert content_key(vector) == content_key(torch.arange(4.0))


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(1, 5)), max_size=60), st.integers(1, 12))
def test_the_table_keeps_what_was_used_last_within_its_bytes(uses, capacity):
    table, used = Table(capacity), []
    for key, puts, size in uses:
        if puts:
            table.put(key, {"layer": torch.full((size,), key, dtype=torch.uint8)})
        row = table.get(key)
        if row is not None:
            assert (row["layer"] == key).all()
            used = [*(known for known in used if known != key), key]
        assert table.bytes <= capacity or len(table) == 1
        kept = [known for known in used if known in table]
        assert kept == used[len(used) - len(kept) :] and len(kept) == len(table)
    table.clear()
    assert table.bytes == len(table) == 0


def test_bytes_are_those_of_the_memory_that_rows_keep():
    table = Table(1000)
    whole = torch.zeros(100, dtype=torch.uint8)
    table.put("a", {"layer": whole.chunk(2), "other": [torch.zeros(10, dtype=torch.uint8)]})
    table.put("a", {"layer": whole.chunk(4)})
    assert table.bytes == 100
