"""The mark itself and its hooks; what they are for is tested in tests/test_apply.py."""

import pytest
import torch

from evdit_opt.errors import PlanMismatchError
from evdit_opt.masks import Rule
from evdit_opt.passes.marks import MARK, SiteSpec, add_marks
from tests.models.toy_dit import toy, toy_inputs


@pytest.mark.parametrize(
    "spec",
    [
        SiteSpec(Rule()),
        SiteSpec(Rule(0, 3, "none", "paper"), 226, 0, 4096),
        SiteSpec(Rule(3, 2, "balanced", "centred"), 5, 77, 1000),
    ],
    ids=["default", "window", "everything"],
)
def test_a_spec_survives_its_string(spec: SiteSpec) -> None:
    assert SiteSpec.decode(spec.encode()) == spec


def test_a_mark_that_runs_is_an_error() -> None:
    with pytest.raises(PlanMismatchError, match="a site mark was left in it"):
        MARK(torch.ones(1, 2, 3), SiteSpec(Rule()).encode(), 2, 1, None, "sparse", None)


def test_another_backend_does_not_silently_drop_a_mark() -> None:
    model = toy(1)
    root = add_marks(model, {"blocks.0.attn1": SiteSpec(Rule()).encode()}, None)
    with torch.no_grad(), pytest.raises(PlanMismatchError, match="another backend"):
        torch.compile(model, backend="eager")(**toy_inputs())
    root.remove()
    model(**toy_inputs())


def test_unknown_modules_are_named_and_nothing_is_hooked() -> None:
    model = toy(1)
    with pytest.raises(PlanMismatchError, match=r"blocks\.4\.attn1"):
        add_marks(model, {"blocks.0.attn1": "", "blocks.4.attn1": ""}, None)
    assert not any(module._forward_pre_hooks for module in model.modules())
