"""torch.export of plans with residual reuse: residuals go in and out, nothing stays inside."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from evdit_opt.apply import apply_plan, is_optimized
from evdit_opt.errors import PlanMismatchError, UnsupportedInputError
from evdit_opt.export import export_program
from evdit_opt.export.residuals import residual_values
from evdit_opt.models import config_hash
from evdit_opt.reuse import with_reuse
from tests.export.generation import (
    LEVELS,
    MODES,
    Planned,
    apart,
    at,
    generate,
    in_this_package,
    reusing,
)
from tests.export.planned import first, planned_toy
from tests.models.timed_toy import TimedToy
from tests.models.toy_dit import make_plan, toy_rules

# A step with its residuals carried on is off by a few roundings a layer, as one forward is
# (test_program.py), and starts from what the steps before it were off by.
ROUNDED = len(LEVELS) * 16 * torch.finfo(torch.float32).eps
SITES = ("blocks.0.attn1", "blocks.1.attn1")
Toy = tuple[Planned, dict[str, ExportedProgram]]


def exported(given: Planned, **options: Any) -> dict[str, ExportedProgram]:
    return {
        mode: export_program(given.model, given.call, given.plan, mode=mode, **options)
        for mode in sorted(set(MODES))
    }


@pytest.fixture(scope="module")
def toy() -> Toy:
    given = reusing("toy")
    return given, exported(given)


def run(given: Planned, programs: dict[str, ExportedProgram]) -> list[Tensor]:
    """The generation by the programs alone; what is kept is kept here."""
    record = given.plan.reuse
    assert record is not None
    modules = {mode: program.module() for mode, program in programs.items()}
    kept: list[tuple[float, dict[str, Tensor]]] = []

    def predict(latents: Tensor, level: float) -> Tensor:
        mode, call = MODES[LEVELS.index(level)], at(given, latents, level)
        if mode == "dense":
            return first(modules[mode](**call))
        if mode == "refresh":
            output, residuals = modules[mode](**call)
            kept.append((level, residuals))
            return first(output)
        ahead = record.ahead(level, [known for known, _ in kept])
        (_, before), (_, now) = (kept * 2)[-2:]
        moved = {name: r + ahead * (r - before[name]) for name, r in now.items()}
        return first(modules[mode](**call, residuals=moved))

    return generate(given, predict)


@pytest.mark.parametrize(
    "kind",
    ["toy", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("wan", "cogvideox"))],
)
def test_a_generation_by_programs_is_that_of_the_optimized_model(kind: str) -> None:
    plain, given = reusing(kind, trend=False), reusing(kind)
    programs = exported(given)
    expected, unmoved = in_this_package(given), in_this_package(plain)
    # The same operators in the same order; only what is carried on is summed up elsewhere.
    assert apart(run(plain, programs), unmoved) == 0.0
    assert apart(run(given, programs), expected) < ROUNDED
    assert apart(unmoved, expected) > 100 * ROUNDED, "the trend makes no difference"
    assert not is_optimized(given.model)


def test_standard_operators_compute_the_same() -> None:
    given = reusing("toy")
    programs = exported(given, standard_ops=True)
    assert apart(run(given, programs), in_this_package(given)) < ROUNDED
    for program in programs.values():
        calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert {target.namespace for target in calls if hasattr(target, "namespace")} == {"aten"}


def test_nothing_but_residuals_goes_in_and_out(toy: Toy) -> None:
    given, programs = toy
    own = {"hidden_states", "text", "timestep"}
    for mode, program in programs.items():
        signature, values = program.graph_signature, residual_values(program, mode)
        assert tuple(values.values()) == (() if mode == "dense" else SITES)
        assert set(signature.user_inputs) == own | (set(values) if mode == "reuse" else set())
        assert len(signature.user_outputs) == (3 if mode == "refresh" else 1)
        inputs = {spec.kind for spec in signature.input_specs}
        assert inputs == {InputKind.PARAMETER, InputKind.USER_INPUT}
        assert {spec.kind for spec in signature.output_specs} == {OutputKind.USER_OUTPUT}
        writes = [node.target for node in program.graph.nodes if "_." in str(node.target)]
        assert not writes
        assert set(program.state_dict) == set(given.model.state_dict())


def test_save_and_load(toy: Toy, tmp_path: Path) -> None:
    given, programs = toy
    loaded = {}
    for mode, program in programs.items():
        torch.export.save(program, tmp_path / f"{mode}.pt2")
        loaded[mode] = torch.export.load(tmp_path / f"{mode}.pt2")
    assert apart(run(given, loaded), in_this_package(given)) < ROUNDED


def test_a_model_with_the_plan_applied_stays_as_it_is() -> None:
    given = reusing("toy")
    apply_plan(given.model, given.plan, inner="eager")
    program = export_program(given.model, given.call, mode="reuse")
    assert tuple(residual_values(program, "reuse").values()) == SITES
    assert given.model._evdit.live.mode == "sparse"
    again = generate(given, lambda x, level: first(given.model(**at(given, x, level))))
    assert apart(again, in_this_package(reusing("toy"))) == 0.0


def test_wrong_residuals_are_refused_by_name(toy: Toy) -> None:
    given, programs = toy
    refresh, reuse = (programs[mode].module() for mode in ("refresh", "reuse"))
    _, residuals = refresh(**given.call)
    with pytest.raises(ValueError, match="residuals"):
        reuse(**given.call)
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn1', 'blocks\.7\.attn1'"):
        reuse(**given.call, residuals={SITES[0]: residuals[SITES[0]], "blocks.7.attn1": None})
    short = {**residuals, SITES[0]: residuals[SITES[0]][:, :, :5]}
    with pytest.raises(AssertionError, match=r"residuals\['blocks\.0\.attn1'\]\.size\(\)\[2\]"):
        reuse(**given.call, residuals=short)


@pytest.mark.parametrize("mode", [None, "sparse", "refesh"])
def test_a_plan_that_reuses_needs_one_of_its_modes(mode: str | None) -> None:
    given = reusing("toy")
    with pytest.raises(PlanMismatchError, match=r"expected mode to be one of .*with residual"):
        export_program(given.model, given.call, given.plan, mode=mode)
    assert not is_optimized(given.model)


def test_a_plan_that_does_not_reuse_has_no_modes() -> None:
    given = planned_toy()
    with pytest.raises(PlanMismatchError, match=r"\(None,\) for a plan without residual reuse"):
        export_program(given.model, given.call, given.plan, mode="reuse")


def test_a_noise_level_that_would_become_a_constant_is_refused() -> None:
    given = reusing("toy")
    with pytest.raises(UnsupportedInputError, match=r"a tensor as 'timestep'.*got 300"):
        export_program(given.model, {**given.call, "timestep": 300.0}, given.plan, mode="reuse")


def test_a_site_in_a_scope_is_refused() -> None:
    given = reusing("toy")
    scoped = tuple(replace(site, way="scope") for site in given.plan.sites)
    plan = replace(given.plan, sites=scoped, fullgraph=False)
    with pytest.raises(PlanMismatchError, match=r"blocks\.0\.attn1 is reached in a scope"):
        export_program(given.model, given.call, plan, mode="refresh")


def other(model: nn.Module) -> Planned:
    """A model like the toy, whose first site reuses."""
    plan = with_reuse(make_plan(model, toy_rules(2)), (900.0,), sites=["blocks.0.attn1"])
    given = reusing("toy")
    return Planned(model.eval(), given.call, replace(plan, model_config_hash=config_hash(model)))


class Repeats(TimedToy):
    """Runs its first block twice."""

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        x = super().forward(hidden_states, text, timestep)
        return self.blocks[0](x, self.text(text))


class OwnResiduals(TimedToy):
    """Takes residuals of another kind."""

    def forward(
        self, hidden_states: Tensor, text: Tensor, timestep: Tensor, residuals: Tensor
    ) -> Tensor:
        return super().forward(hidden_states + residuals, text, timestep)


def test_a_site_that_runs_twice_is_refused() -> None:
    given = other(Repeats())
    with pytest.raises(PlanMismatchError, match=r"blocks\.0\.attn1 to run once.*it runs twice"):
        export_program(given.model, given.call, given.plan, mode="refresh")
    assert not is_optimized(given.model)


def test_an_argument_of_the_same_name_is_refused() -> None:
    given = other(OwnResiduals())
    call = {**given.call, "residuals": torch.zeros(())}
    with pytest.raises(UnsupportedInputError, match="an argument of its own named 'residuals'"):
        export_program(given.model, call, given.plan, mode="reuse")
