"""GELU in its tanh form, without a tanh."""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor, nn

_LINEAR = sqrt(8 / pi)
_CUBIC = 0.044715 * _LINEAR


def logistic_gelu(x: Tensor) -> Tensor:
    """``gelu(x, approximate="tanh")`` by the logistic function, computed in float32 at least, in the dtype of ``x``.

    ``0.5 * x * (1 + tanh(u)) = x / (1 + exp(-2 * u))`` with ``u = sqrt(2 / pi) * (x + 0.044715 * x ** 3)`` (Hendrycks
    and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (1 + torch.exp(-wide * (_LINEAR + _CUBIC * (wide * wide))))).to(x.dtype)


class LogisticGelu(nn.Module):
    """``logistic_gelu`` as a layer, for a compiler that makes one kernel of it: there a tanh takes several times as
    long as an exp, on a GPU longer than reading and writing the activations."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; in the dtype of ``x``."""
        return logistic_gelu(x)
