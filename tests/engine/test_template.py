import gc
import weakref

import pytest
import torch
from hotpath_pack.hotpath.template import Given, NotHoistable, plan_block
from torch import nn
from torch.func import functional_call
from torch.nn import Linear


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Block(nn.Module):
    def __init__(self, width=8, factor=2.0):
        super().__init__()
        self.first = Linear(width, width)
        self.inner = nn.Sequential(nn.GELU(approximate="tanh"), Linear(width, width, bias=False))
        self.scale = Scale(factor)

    def forward(self, x):
        return self.scale(self.inner(self.first(x)))


def plain_layer(module):
    if type(module) is Linear:
        return Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    if type(module) in (Block, Scale, nn.Sequential, nn.GELU):
        return None
    raise NotHoistable(f"{type(module).__name__} is unknown")


def weights_of(plan, block):
    return {
        f"{path}.{name}": value
        for path, layer, _ in plan.layers(block)
        for name, value in layer.named_parameters(recurse=False)
    }


def test_the_template_computes_with_any_blocks_weights():
    first, second = Block(), Block()
    plan = plan_block(first, plain_layer)
    x = torch.randn(3, 8)
    for block in (first, second):
        weights = weights_of(plan_block(block, plain_layer), block)
        assert torch.equal(functional_call(plan.template, weights, (x,)), block(x))


def test_the_template_holds_no_memory():
    plan = plan_block(Block(), plain_layer)
    assert all(parameter.is_meta for parameter in plan.template.parameters())


def test_what_is_left_on_modules_by_who_moves_their_weights_is_no_structure():
    block = Block()
    block.moved = True
    assert plan_block(block, plain_layer).key != plan_block(Block(), plain_layer).key
    assert plan_block(block, plain_layer, bookkeeping=("moved",)).key == plan_block(Block(), plain_layer).key


def test_equal_structures_share_a_key_and_different_ones_do_not():
    key = plan_block(Block(), plain_layer).key
    assert plan_block(Block(), plain_layer).key == key
    assert plan_block(Block(width=16), plain_layer).key != key
    assert plan_block(Block(factor=3.0), plain_layer).key != key
    without_bias = Block()
    without_bias.first = Linear(8, 8, bias=False)
    assert plan_block(without_bias, plain_layer).key != key


def test_planning_leaves_the_random_state_alone():
    block, before = Block(), torch.get_rng_state()
    plan_block(block, plain_layer)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_keeps_no_block_alive():
    block = Block()
    plan = plan_block(block, plain_layer)
    gone = weakref.ref(block.first)
    del block
    gc.collect()
    assert gone() is None
    assert plan.template is not None


def bolt_hook(block):
    block.first.register_forward_hook(lambda module, args, out: out)


def bolt_pre_hook(block):
    block.inner[1].register_forward_pre_hook(lambda module, args: args)


def bolt_forward(block):
    block.scale.forward = lambda x: x


def bolt_parametrization(block):
    nn.utils.parametrizations.weight_norm(block.first)


def bolt_foreign_class(block):
    class Foreign(Linear):
        pass

    block.inner[1] = Foreign(8, 8)


def bolt_parameter(block):
    block.gain = nn.Parameter(torch.ones(1))


def bolt_child(block):
    block.extra = nn.GELU()


BOLTED = [bolt_hook, bolt_pre_hook, bolt_forward, bolt_parametrization, bolt_foreign_class, bolt_parameter]


@pytest.mark.parametrize("bolt", BOLTED)
def test_what_is_bolted_onto_a_block_is_refused(bolt):
    block = Block()
    bolt(block)
    with pytest.raises(NotHoistable):
        plan_block(block, plain_layer)


@pytest.mark.parametrize("bolt", [bolt for bolt in BOLTED if bolt is not bolt_parameter] + [bolt_child])
def test_what_is_bolted_on_later_is_noticed(bolt):
    block = Block()
    plan = plan_block(block, plain_layer)
    bolt(block)
    with pytest.raises(NotHoistable):
        plan.layers(block)


@pytest.mark.parametrize("name", ["forward", "twice"])
def test_a_method_or_property_of_a_class_that_is_replaced_is_noticed(monkeypatch, name):
    class Own(Block):
        @property
        def twice(self):
            return 2

        def forward(self, x):
            return super().forward(x) * self.twice

    def plain(module):
        return None if isinstance(module, Own) else plain_layer(module)

    block = Own()
    plan = plan_block(block, plain)
    with monkeypatch.context() as patched:
        patched.setattr(Own, name, property(lambda self: 3) if name == "twice" else Block.forward)
        with pytest.raises(NotHoistable, match=f"{name} of a class was replaced"):
            plan.layers(block)
        assert plan_block(block, plain).key != plan.key
    assert plan.layers(block) and plan_block(block, plain).key == plan.key


def test_a_layer_swapped_for_one_like_it_is_noticed():
    block = Block()
    plan = plan_block(block, plain_layer)
    old = block.first
    block.first = Linear(8, 8)
    with pytest.raises(NotHoistable, match="first was replaced"):
        plan.layers(block)
    block.first = old
    assert plan.layers(block)[0] == ("first", old, None)


def test_state_that_cannot_be_copied_is_named():
    block = Block()
    block.scale.table = [1, 2]
    with pytest.raises(NotHoistable, match="scale.table is a list"):
        plan_block(block, plain_layer)


def test_what_is_given_becomes_an_input_of_the_template():
    block = Block()
    plain, want = plan_block(block, plain_layer), block(torch.ones(3, 8))
    block.inner.forward = Given(block.inner, lambda x: x * 3)
    plan = plan_block(block, plain_layer)
    assert plan.given == ("inner",) and plain.given == () and plan.key != plain.key
    assert [path for path, _, _ in plan.layers(block)] == ["first"]
    with pytest.raises(NotHoistable, match="inner computes in another way"):
        plain.layers(block)
    # In the template the module takes the result by its own path.
    template, weights = plan.template, weights_of(plan, block)
    template.first.forward = lambda x: {"inner": x * 3}
    assert torch.equal(functional_call(template, weights, (torch.ones(3, 8),)), torch.full((3, 8), 6.0))
    del block.inner.forward
    with pytest.raises(NotHoistable, match="inner computes in another way"):
        plan.layers(block)
    assert torch.equal(block(torch.ones(3, 8)), want)


def test_a_tracer_sees_the_module_itself_and_not_what_is_given():
    block = Block()
    want = block(torch.ones(3, 8))
    block.inner.forward = Given(block.inner, lambda x: x * 0)
    assert (block(torch.ones(3, 8)) == 0).all()
    traced = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(traced(torch.ones(3, 8)), want)
