"""A file of the host that this pack has never seen: activations, each put in its block's MLP."""

import torch
from torch import nn

LIMITS = (0.5, 2.0)
MEMORY = {}


class Nothing(nn.Module):
    pass


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor, self.extent = 1.5, (1, "tanh")

    def forward(self, x):
        return self.inner(x).clamp(-LIMITS[1], LIMITS[1])

    def inner(self, x):
        return torch.tanh(x) * self.factor


class Folded(nn.Sequential):
    def __init__(self):
        super().__init__(Scaled(), nn.Tanh())

    def forward(self, x):
        return self[1](self[0](x)) * 2


class FoldedThatCounts(Folded):
    def forward(self, x):
        self.calls = len(self)
        return super().forward(x)


class Counts(Scaled):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(x) * self.calls


class CountsInside(Scaled):
    def inner(self, x):
        def count():
            self.factor = self.factor + 1
            return self.factor

        return torch.tanh(x) * count()


class LooksItselfUp(Scaled):
    def forward(self, x):
        return torch.tanh(x) * MEMORY.get(id(self), 1.0)


class LooksItselfUpInItsClass(Scaled):
    SEEN = {}  # noqa: RUF012

    def forward(self, x):
        return torch.tanh(x) * len(self.SEEN)


class Lists(Scaled):
    def __init__(self):
        super().__init__()
        self.steps = [1.0, 2.0]

    def forward(self, x):
        return torch.tanh(x) * self.steps[0]


class HoldsATensor(Scaled):
    def __init__(self):
        super().__init__()
        self.held = torch.ones(3)


class Buffered(Scaled):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.ones(3))


class Weighted(Scaled):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)


class Hooked(Scaled):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, args, out: out * 2)
