"""The toy video transformer with a branch on data between its projections and its attention."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from evdit_opt.masks import Rule
from evdit_opt.plan import Plan
from tests.models.toy_dit import Attention, ToyDiT, make_plan, toy


class BranchingAttention(Attention):
    """``outside``: attends where Dynamo traces nothing, in a context manager it does not know."""

    outside = False

    def forward(self, hidden_states: Tensor, context: Tensor | None = None) -> Tensor:
        context = hidden_states if context is None else context
        q, k, v = (
            project(x).unflatten(2, (2, -1)).transpose(1, 2)
            for project, x in ((self.q, hidden_states), (self.k, context), (self.v, context))
        )
        if torch.any(q.isnan()):
            raise ArithmeticError("q is not a number")
        return self.attend(q, k, v).transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.outside:
            return F.scaled_dot_product_attention(q, k, v)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.backends.cuda.sdp_kernel(enable_math=True):
                return F.scaled_dot_product_attention(q, k, v)


def branching(layers: int = 2, outside: bool = False) -> ToyDiT:
    """A toy whose ``attn1`` branch; same weights as ``toy(layers)``."""
    return make_branching(toy(layers), outside)


def make_branching(model: ToyDiT, outside: bool) -> ToyDiT:
    """Let every ``attn1`` of a toy branch."""
    for block in model.blocks:
        block.attn1.__class__ = BranchingAttention
        block.attn1.outside = outside
    return model


def scope_plan(model: ToyDiT, rules: dict[str, Rule | None], **options: object) -> Plan:
    """A plan that reaches all sites in scopes."""
    return make_plan(model, rules, fullgraph=False, way="scope", **options)  # type: ignore[arg-type]
