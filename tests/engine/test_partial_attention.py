"""Attention in two parts is attention to all, and asks for the others' keys before it attends to its own."""

import re

import pytest
import torch
from hotpath_pack.hotpath import partial_attention
from hotpath_pack.hotpath.first_run import alone
from hotpath_pack.hotpath.partial_attention import attention_over_devices, has_parts
from hotpath_pack.hotpath.split import Crew, places_of, shares
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention

DEVICES = [torch.device("cpu", number) for number in range(3)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}


@pytest.fixture(scope="module")
def crew():
    made = Crew(DEVICES, lambda device: None)
    yield made
    made.end()


@given(
    text=st.integers(6, 15),
    image=st.integers(6, 30),
    batch=st.integers(1, 2),
    scale=st.sampled_from([0.1, 1, 30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
@settings(max_examples=20)
def test_each_device_has_what_its_queries_have_of_all(crew, text, image, batch, scale, dtype, seed):
    """Also where one part outweighs the other by far."""
    total, generator = text + image, torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, 2, total, 8, generator=generator)
    k *= torch.linspace(1 / scale, scale, total)[:, None]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    want = scaled_dot_product_attention(q.float(), k.float(), v.float()).transpose(1, 2).flatten(2)
    places = places_of([shares(text, 3), shares(image, 3)])
    rows = [torch.cat([torch.arange(total)[each] for each in place]) for place in places]
    counts = [len(each) for each in rows]
    assert has_parts(q)

    def work(place, tensors):
        return attention_over_devices(*tensors, total - counts[place])

    parts = crew.run([[x[:, :, each] for x in (q, k, v)] for each in rows], counts, work)
    assert {part.dtype for part in parts} == {dtype}
    for part, each in zip(parts, rows, strict=True):
        torch.testing.assert_close(part.float(), want[:, each], atol=TOLERANCE[dtype] * 3, rtol=TOLERANCE[dtype])


def test_compiled_it_gives_attends_and_takes_in_this_order():
    """Else the copies would wait for attention, or attention for them."""

    def block(x, w, like):
        q, k, v = (x @ w).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return attention_over_devices(q, k * 2, v, like.shape[0])

    x, w, like = torch.randn(1, 10, 16), torch.randn(16, 48), torch.empty(15, 0)
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.mark_dynamic(like, 0)
    with torch.inference_mode(), alone():
        got, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x, w, like)
        torch.testing.assert_close(got, block(x, w, like))
    called = re.findall(r"torch\.ops\.(\w+\.\w+)\.default\(", code)
    attention = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert called == ["hotpath.give", attention, "hotpath.take", attention]


@pytest.mark.parametrize(
    ("dtype", "head", "capability", "has"),
    [
        (torch.bfloat16, 128, (9, 0), True),
        (torch.float16, 256, (8, 0), True),
        (torch.float32, 128, (9, 0), False),
        (torch.bfloat16, 260, (9, 0), False),
        (torch.bfloat16, 100, (9, 0), False),
        (torch.float16, 64, (7, 5), False),
    ],
)
def test_cards_and_heads_that_have_no_such_attention_are_told(monkeypatch, dtype, head, capability, has):
    class OnCard:
        is_cuda, shape = True, (1, 2, 10, head)

    OnCard.dtype = dtype
    monkeypatch.setattr(partial_attention, "_capability", lambda like: capability)
    assert has_parts(OnCard()) is has
    # On AMD's cards numbers of capability mean something else.
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_parts(OnCard())
