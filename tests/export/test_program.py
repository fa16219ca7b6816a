"""torch.export: the numbers of the optimized model, in a program that others can load."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from evdit_opt import api
from evdit_opt.apply import is_optimized
from evdit_opt.errors import AlreadyOptimizedError, PlanMismatchError, UnsupportedInputError
from evdit_opt.export import export_program
from evdit_opt.masks import Rule
from evdit_opt.models import config_hash
from tests.export.planned import Planned, first, planned, planned_toy
from tests.often import often

# wan: video alone. cogvideox: text before. hunyuan: text behind, a key mask. ltx: tokens as input.
KINDS = ("wan", "cogvideox", "hunyuan", "ltx")
OP = torch.ops.evdit.tile_attention.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def count(program: torch.export.ExportedProgram, target: object) -> int:
    return sum(node.target is target for node in program.graph.nodes)


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in targets if hasattr(target, "namespace")}


@torch.no_grad()
def run(program: torch.export.ExportedProgram, given: Planned) -> torch.Tensor:
    return first(program.module()(**given.call))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("kind", often(["wan"], {kind: kind for kind in KINDS}))
def test_a_program_computes_what_the_optimized_model_computes(kind: str) -> None:
    given = planned(kind)
    expected, dense = given.optimized(), given.dense()
    with torch.no_grad():
        plain = torch.export.export(given.model, (), given.call, strict=False)
    sites = len(given.plan.rules)

    program = export_program(given.model, given.call, given.plan)
    assert torch.equal(run(program, given), expected)
    assert count(program, OP) == sites
    assert count(program, OP) + count(program, SDPA) == count(plain, SDPA)
    assert namespaces(program) == {"aten", "evdit"}

    standard = export_program(given.model, given.call, given.plan, standard_ops=True)
    assert namespaces(standard) == {"aten"}
    # The same sums in another order: a few roundings a layer.
    assert relative(run(standard, given), expected) < 16 * torch.finfo(torch.float32).eps
    assert relative(dense, expected) > 1000 * torch.finfo(torch.float32).eps

    assert not is_optimized(given.model)
    assert torch.equal(given.dense(), dense)
    assert set(program.state_dict) == set(given.model.state_dict())


def test_the_weights_are_those_of_the_model() -> None:
    given = planned_toy()
    program = export_program(given.model, given.call, given.plan)
    for name, parameter in given.model.named_parameters():
        assert program.state_dict[name].data_ptr() == parameter.data_ptr()


def test_an_optimized_model_needs_no_plan_and_stays_optimized() -> None:
    given = planned_toy()
    expected = given.optimized()
    api.apply_plan(given.model, given.plan, inner="eager", impl="reference")
    program = export_program(given.model, given.call)
    assert relative(run(program, given), expected) < 4 * torch.finfo(torch.float32).eps
    impls = {node.args[-1] for node in program.graph.nodes if node.target is OP}
    assert impls == {"reference"}
    assert is_optimized(given.model)
    assert relative(given.dense(), expected) < 4 * torch.finfo(torch.float32).eps

    other = replace(given.plan, min_tokens=given.plan.min_tokens + 1)
    with pytest.raises(AlreadyOptimizedError, match="another is applied"):
        export_program(given.model, given.call, other)


def test_sites_reached_in_a_scope_are_exported_too() -> None:
    given = planned_toy(way="scope", fullgraph=False)
    program = export_program(given.model, given.call, given.plan)
    assert count(program, OP) == len(given.plan.rules)
    assert torch.equal(run(program, given), given.optimized())


def test_save_and_load(tmp_path: Path) -> None:
    given = planned_toy()
    expected = given.optimized()
    program = export_program(given.model, given.call, given.plan)
    torch.export.save(program, tmp_path / "toy.pt2")
    assert torch.equal(run(torch.export.load(tmp_path / "toy.pt2"), given), expected)


LOADS_ALONE = """
import sys, torch
program = torch.export.load("toy.pt2")
call, expected = torch.load("call.pt")
with torch.no_grad():
    out = program.module()(**call)
torch.testing.assert_close(out, expected)
assert not any(name.startswith("evdit_opt") for name in sys.modules)
print("same numbers")
"""


def test_standard_operators_need_nothing_of_this_package(tmp_path: Path) -> None:
    given = planned_toy()
    program = export_program(given.model, given.call, given.plan, standard_ops=True)
    torch.export.save(program, tmp_path / "toy.pt2")
    torch.save((given.call, given.optimized()), tmp_path / "call.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADS_ALONE], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "same numbers" in done.stdout


def test_no_plan_is_an_error() -> None:
    given = planned_toy()
    with pytest.raises(PlanMismatchError, match="expected a plan"):
        export_program(given.model, given.call)


def test_a_plan_without_rules_is_an_error() -> None:
    given = planned_toy()
    sites = tuple(replace(site, rule=None, density=1.0) for site in given.plan.sites)
    with pytest.raises(PlanMismatchError, match="leaves all 2 sites dense"):
        export_program(given.model, given.call, replace(given.plan, sites=sites))
    assert not is_optimized(given.model)


def test_a_plan_of_another_model_is_an_error() -> None:
    given = planned_toy()
    with pytest.raises(PlanMismatchError, match="configuration hashes"):
        export_program(given.model, given.call, replace(given.plan, model_config_hash="other"))


def test_planned_sites_that_stay_dense_are_an_error() -> None:
    short = planned_toy(min_tokens=1000)
    with pytest.raises(PlanMismatchError, match=r"2 stay dense: blocks\.0\.attn1: 24 tokens"):
        export_program(short.model, short.call, short.plan)

    given = planned_toy()
    first_site, second = given.plan.sites
    full = replace(given.plan, sites=(first_site, replace(second, rule=Rule(4))))
    with pytest.raises(PlanMismatchError, match=r"1 stay dense: blocks\.1\.attn1: rule .* keeps"):
        export_program(given.model, given.call, full)


class Skips(nn.Module):
    """Runs one of its two planned blocks only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.spare = inner.blocks[1].attn1
        del inner.blocks[1]

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden_states, text)


def test_a_planned_site_that_never_runs_is_an_error() -> None:
    given = planned_toy()
    names = ("inner.blocks.0.attn1", "spare")
    sites = tuple(
        replace(site, name=name) for site, name in zip(given.plan.sites, names, strict=True)
    )
    model = Skips(given.model)
    plan = replace(
        given.plan, sites=sites, model_class="Skips", model_config_hash=config_hash(model)
    )
    with pytest.raises(PlanMismatchError, match="1 stay dense: spare: not"):
        export_program(model, given.call, plan)


def test_a_model_that_branches_on_data_is_refused_with_the_reason() -> None:
    given = planned("hunyuan15")
    with pytest.raises(UnsupportedInputError, match=r"cannot: .*data-dependent"):
        export_program(given.model, given.call, given.plan)
    assert not is_optimized(given.model)


def test_text_of_a_length_that_only_the_run_can_tell_needs_the_operator() -> None:
    given = planned("mochi")
    program = export_program(given.model, given.call, given.plan)
    assert torch.equal(run(program, given), given.optimized())
    with pytest.raises(UnsupportedInputError, match="expected a MochiTransformer3DModel that"):
        export_program(given.model, given.call, given.plan, standard_ops=True)
