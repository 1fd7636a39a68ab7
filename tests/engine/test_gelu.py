"""GELU by the logistic function is PyTorch's in its tanh form."""

import pytest
import torch
from hotpath_pack.hotpath.gelu import logistic_gelu
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import gelu

NUMBERS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=64)


@given(NUMBERS)
def test_the_same_as_pytorch_up_to_its_own_rounding(numbers):
    x = torch.tensor(numbers)
    exact = gelu(x.double(), approximate="tanh")
    off = (logistic_gelu(x) - exact).abs()
    assert (off <= 4e-7 * (1 + exact.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x = torch.linspace(-12, 12, 4001).to(dtype)
    exact = gelu(x.double(), approximate="tanh")
    out = logistic_gelu(x)
    assert out.dtype == dtype
    assert ((out - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 4e-7).all()


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_what_is_no_number_stays_so(number):
    x = torch.tensor([number])
    torch.testing.assert_close(logistic_gelu(x), gelu(x, approximate="tanh"), equal_nan=True)
