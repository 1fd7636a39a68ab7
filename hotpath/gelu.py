"""GELU in its tanh form, without a tanh."""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor, nn


class LogisticGelu(nn.Module):
    """``gelu(x, approximate="tanh")`` by the logistic function.

    ``0.5 * x * (1 + tanh(u)) = x * sigmoid(2 * u)`` with ``u = sqrt(2 / pi) * (x + 0.044715 * x ** 3)`` (Hendrycks and
    Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415). On a GPU Inductor's tanh takes longer than reading and
    writing the activations, and its sigmoid a fraction of that.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; computed in float32 at least, in the dtype of ``x``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.sigmoid(sqrt(8 / pi) * wide * (1 + 0.044715 * wide * wide))).to(x.dtype)
