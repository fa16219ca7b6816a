"""A plan on graphs that were exported or lowered before: no modules to hook, other operators."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from evdit_opt.apply import apply_plan, restore
from evdit_opt.backend import evdit
from tests.models.plain_attention import Einsum, HeadsInTheBatch, Matmul, PackedModule
from tests.models.toy_dit import GRID, Attention, ToyDiT, make_plan, toy_inputs, toy_rules
from tests.often import often

# float32 rounding of a different summation order; dense and sparse differ by more than 1e-2.
CLOSE = 2e-6

Call = Callable[..., Tensor]
Options = dict[str, Any]


def exported(model: nn.Module, options: Options) -> Call:
    """``torch.export``: attention is one operator still."""
    module = torch.export.export(model, (), toy_inputs()).module()
    return torch.compile(module, backend="evdit", options=options, fullgraph=True)


def lowered(model: nn.Module, options: Options) -> Call:
    """To core ATen: attention is spelled out, a linear is views and a product."""
    module = torch.export.export(model, (), toy_inputs()).run_decompositions().module()
    return torch.compile(module, backend="evdit", options=options, fullgraph=True)


def handed_over(model: nn.Module, options: Options) -> Call:
    """The graph itself, without Dynamo."""
    module = torch.export.export(model, (), toy_inputs()).module()
    compiled = evdit(module, list(toy_inputs().values()), options=options)
    return lambda **inputs: compiled(*inputs.values())


def after_aot(model: nn.Module, options: Options) -> Call:
    """As a compiler behind AOT: weights have no names, attention is an operator of the device."""
    # Nothing tells the video among unnamed inputs.
    compiler = functools.partial(evdit, options={**options, "layout": GRID})
    return torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)


WAYS = (exported, lowered, handed_over, after_aot)
FLAVOURS = (Attention, Matmul, Einsum, HeadsInTheBatch, PackedModule)


def start(flavour: Callable[[int], nn.Module]) -> tuple[ToyDiT, Options]:
    torch.manual_seed(0)
    model = ToyDiT(attention=flavour).eval()
    inner = ".attention" if flavour is PackedModule else ""
    rules = {f"{name}{inner}": rule for name, rule in toy_rules().items()}
    return model, {"plan": make_plan(model, rules), "inner": "eager"}


CASES = {f"{way.__name__}-{kind.__name__}": (way, kind) for way in WAYS for kind in FLAVOURS}
OFTEN = [name for name, (way, kind) in CASES.items() if way is after_aot or kind is Einsum]


@pytest.mark.parametrize(("way", "flavour"), often(OFTEN, CASES))
@torch.no_grad()
def test_the_plan_reaches_every_site(way: Callable[..., Call], flavour: Any) -> None:
    model, options = start(flavour)
    dense = model(**toy_inputs())
    apply_plan(model, options["plan"], inner="eager")
    expected = model(**toy_inputs())
    restore(model)
    actual = way(model, options)(**toy_inputs())
    assert (dense - expected).abs().max() > 1e-2
    assert (actual - expected).abs().max() < CLOSE
