"""Observing: every site is seen, nothing changes, whatever Dynamo does to the graph."""

import pytest
import torch
import torch.nn.functional as F

from evdit_opt.apply import apply_plan
from evdit_opt.errors import AlreadyOptimizedError, PlanMismatchError
from evdit_opt.passes.observe_attention import observe
from tests.models.plain_attention import LooksAtModuleWeights
from tests.models.toy_dit import ToyDiT, make_plan, toy, toy_inputs, toy_rules


@pytest.mark.parametrize("breaks", [False, True], ids=["fullgraph", "shared-graphs"])
def test_each_site_is_seen_under_its_own_name(breaks: bool) -> None:
    model = toy(3, breaks=breaks)
    names = tuple(toy_rules(3))
    seen: dict[str, torch.Tensor] = {}

    def look(name, q, k, v, attn_mask, scale):
        assert attn_mask is None
        assert scale is None
        assert not q.requires_grad
        seen[name] = F.scaled_dot_product_attention(q, k, v)

    expected = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: expected.update({name: out.detach()})
        )
        for name in names
    ]
    dense = model(**toy_inputs())
    for handle in handles:
        handle.remove()
    with observe(model, names, look):
        assert torch.equal(model(**toy_inputs()), dense)
    assert tuple(seen) == names
    for name, out in seen.items():
        assert torch.equal(out.transpose(1, 2).flatten(2), expected[name]), name


def test_muted_attention_mixes_nothing() -> None:
    model = toy()
    inputs = toy_inputs()
    with torch.no_grad(), observe(model, (), lambda *_: None, mute=True):
        before = model(**inputs)
        inputs["hidden_states"][:, :, 0, 0, 0] += 1
        after = model(**inputs)
    moved = (after != before).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [0]


def test_a_module_without_self_attention_never_calls_back() -> None:
    model, seen = toy(), []
    with torch.no_grad(), observe(model, ("blocks.0.attn2",), lambda *a: seen.append(a)):
        model(**toy_inputs())
    assert seen == []


def test_an_error_of_the_callback_reaches_the_caller_and_leaves_nothing_behind() -> None:
    model = toy()

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), observe(model, ("blocks.0.attn1",), fail):
        model(**toy_inputs())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("evdit" in name for module in model.modules() for name in vars(module))
    model(**toy_inputs())


def test_what_cannot_be_observed_is_an_error() -> None:
    model = toy()
    with pytest.raises(PlanMismatchError, match="nowhere"), observe(model, ("nowhere",), print):
        pass
    apply_plan(model, make_plan(model, toy_rules()), inner="eager")
    with pytest.raises(AlreadyOptimizedError, match="restore"), observe(model, (), print):
        pass


class ReturnsWeights(ToyDiT):
    """Attention that one SDPA call cannot replace: its weights are used twice."""

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        weights = (x @ x.transpose(1, 2)).softmax(-1)
        return x + weights @ x + weights @ (2 * x)


@pytest.mark.parametrize(
    "model",
    [ReturnsWeights(1), ToyDiT(1, attention=LooksAtModuleWeights)],
    ids=["softmax", "nn.MultiheadAttention"],
)
def test_attention_that_is_left_alone_is_muted_too(model: ToyDiT) -> None:
    model, inputs = model.eval(), toy_inputs()
    with torch.no_grad(), observe(model, (), lambda *_: None, mute=True):
        before = model(**inputs)
        inputs["hidden_states"][:, :, 0, 0, 0] += 1
        after = model(**inputs)
    moved = (after != before).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [0]
