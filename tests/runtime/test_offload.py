"""Weights that hooks load or cast: accelerate's and diffusers', with the CPU as accelerator."""

from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from evdit_opt import api
from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.config import Config
from evdit_opt.errors import EvditError, UnsupportedInputError
from evdit_opt.masks import Rule
from evdit_opt.models import as_denoiser
from tests.models import toy_dit
from tests.models.case import Shape
from tests.models.toy_dit import make_plan, toy, toy_inputs
from tests.runtime.pair import WAN, Pair

CPU = torch.device("cpu")


def whole(model: nn.Module) -> None:
    """What enable_model_cpu_offload does to the transformer."""
    cpu_offload_with_hook(model, CPU)


def sequential(model: nn.Module) -> None:
    """What enable_sequential_cpu_offload does to it."""
    cpu_offload(model, CPU, offload_buffers=True)


def blocks(model: nn.Module) -> None:
    apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=1)


def leaves(model: nn.Module) -> None:
    apply_group_offloading(model, CPU, CPU, "leaf_level")


def casting(model: nn.Module) -> None:
    """Weights kept in another dtype than they compute in."""
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


INSIDE = {"sequential": sequential, "leaves": leaves, "casting": casting}
KINDS = {"whole": whole, "blocks": blocks, **INSIDE}
kinds = pytest.mark.parametrize("offload", KINDS.values(), ids=KINDS)
inside = pytest.mark.parametrize("offload", INSIDE.values(), ids=INSIDE)
sdpa = torch.nn.functional.scaled_dot_product_attention
Offload = Callable[[nn.Module], None]


@kinds
def test_a_plan_for_an_offloaded_model(offload: Offload) -> None:
    pair = Pair()
    pair.both(offload)
    pair.apply()
    pair.check()
    pair.check()
    assert bool(report(pair.fast).outside) == (offload in INSIDE.values())
    assert (pair.graphs == 0) == (offload in INSIDE.values())


@kinds
def test_offloading_an_optimized_model(offload: Offload) -> None:
    pair = Pair()
    pair.apply()
    pair.check()
    pair.both(offload)
    pair.check()


def test_blocks_share_their_graphs() -> None:
    graphs = []
    for layers in (3, 6):
        shape = Shape(layers=layers)
        pair = Pair(shape, dict.fromkeys(WAN.rules(shape), WAN.rules(shape)["blocks.0.attn1"]))
        pair.both(blocks)
        pair.apply()
        pair.check()
        graphs.append(pair.graphs)
    assert graphs[0] == graphs[1]


def test_compiled_again_when_the_hooks_are_gone() -> None:
    pair = Pair()
    pair.both(sequential)
    pair.apply()
    pair.check()
    assert "AlignDevicesHook" in report(pair.fast).show()
    pair.both(lambda model: remove_hook_from_module(model, recurse=True))
    pair.check()
    assert not report(pair.fast).outside
    assert pair.graphs == 1


@inside
def test_restore_takes_the_scopes_away(offload: Offload) -> None:
    pair = Pair(Shape(layers=1))
    pair.both(offload)
    pair.apply()
    pair.check()
    restore(pair.fast)
    call = WAN.inputs(pair.shape)
    with torch.no_grad():
        assert torch.equal(pair.fast(**call)[0], pair.plain(**call)[0])
    assert not any(module._forward_pre_hooks for module in pair.fast.modules())
    assert not any(module._forward_hooks for module in pair.fast.modules())


def test_who_insists_on_one_graph_gets_dynamos_error() -> None:
    pair = Pair(Shape(layers=1))
    pair.both(whole)
    pair.apply(fullgraph=True)
    with pytest.raises(Unsupported):
        pair.check()


def test_blocks_compiled_by_somebody_else_do_not_go_with_parts() -> None:
    pair = Pair(Shape(layers=1))
    pair.fast.compile_repeated_blocks(backend="eager")
    pair.both(whole)
    pair.apply()
    with pytest.raises(UnsupportedInputError, match=r"no compiled parts.*blocks\.0"):
        pair.check()


@inside
def test_calibration_of_a_model_in_pieces_is_refused(offload: Offload) -> None:
    pair = Pair(Shape(layers=1))
    offload(pair.fast)
    with pytest.raises(UnsupportedInputError, match="make the plan before sequential"):
        api.make_plan(pair.fast, [WAN.inputs(pair.shape)] * 2, Config(verify_prompts=0))


def test_calibration_of_a_model_moved_as_a_whole_is_not() -> None:
    pair = Pair(Shape(layers=1))
    whole(pair.fast)
    assert as_denoiser(pair.fast, [WAN.inputs(pair.shape)]).model is pair.fast


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, "to call scaled_dot_product_attention"),
        (lambda q, k, v: sdpa(q, k[:, :, :5], v[:, :, :5]), "self-attention"),
    ],
    ids=["spelled-out", "cross-attention"],
)
def test_an_attention_that_no_scope_reaches_is_an_error(
    attend: Callable[..., Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy()
    apply_plan(model, make_plan(model, {"blocks.0.attn1": Rule(1)}), inner="eager")
    sequential(model)
    monkeypatch.setattr(toy_dit.F, "scaled_dot_product_attention", attend)
    with pytest.raises(EvditError, match=message), torch.no_grad():
        model(**toy_inputs())
