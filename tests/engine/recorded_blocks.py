"""Blocks that are recorded, and calls of a model of them."""

from dataclasses import dataclass

import torch
from hotpath_pack.hotpath.recorded import addresses_of


@dataclass
class Modulation:
    shift: torch.Tensor
    scale: torch.Tensor


class Block:
    """Stands for a block, with its weight."""

    def __init__(self, seed, width=4):
        self.known = None, None
        self.weight = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))

    def move(self):
        self.weight = self.weight.clone()


class Graph:
    """A block as the host writes them: its first stream is written over in place. ``new``: its output is not."""

    def __init__(self, new=False):
        self.new = new
        self.accepting = True
        self.calls = 0

    def accepts(self, weights, inputs):
        return self.accepting

    def __call__(self, weights, inputs):
        self.calls += 1
        x, mod = inputs["x"], inputs["vec"]["mod"]
        inputs["tally"] += 1
        x += torch.tanh(x @ weights["w"] * mod.scale + mod.shift) * inputs["pe"]
        return {"x": torch.nan_to_num(x)} if self.new else {"x": x}


def make_inputs(seed, tokens=3, width=4):
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(1, 2 * width, generator=generator)
    shift, scale = both.chunk(2, dim=-1)
    x, pe = (torch.randn(1, tokens, width, generator=generator) for _ in range(2))
    return {
        "x": x,
        "pe": pe,
        "vec": {"mod": Modulation(shift, scale)},
        "mask": None,
        "span": (1, 2),
        "tally": torch.zeros(1),
    }


def step(recordings, graph, blocks, inputs, always=True, between=lambda index, out: out, reasons=None):
    """One call of a model: each block's output is the next one's input."""
    recordings.begin()
    for index, block in enumerate(blocks):
        weights = {"w": block.weight}
        addresses, address = block.known
        # As the host does where it knows that weights are where they were.
        known = addresses if address == block.weight.data_ptr() else None
        done = recordings.run(block, graph, weights, inputs, always, addresses=known)
        block.known = addresses_of(weights), block.weight.data_ptr()
        if done.output is None:
            if done.why_not and reasons is not None:
                reasons.append(done.why_not)
            out = graph(weights, inputs)
            recordings.ran()
        else:
            out = done.output
        inputs = {**inputs, "x": between(index, out["x"])}
    return inputs["x"].clone()


def plain(graph, blocks, inputs):
    for block in blocks:
        inputs = {**inputs, "x": graph({"w": block.weight}, inputs)["x"]}
    return inputs["x"]
