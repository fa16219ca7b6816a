"""torch.compile(model, backend="evdit"): options, plans without marks, the cache key."""

import logging
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from evdit_opt import backend
from evdit_opt.backend import Options, evdit
from evdit_opt.errors import LayoutError, PlanMismatchError, UnsupportedInputError
from evdit_opt.grid import TokenLayout
from evdit_opt.masks import Rule
from tests.models.masked import masked_attention
from tests.models.toy_dit import GRID, SOURCE, ToyDiT, make_plan, toy, toy_inputs, toy_rules

CLOSE = 2e-6


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    # Dynamo remembers per code object where the toy's forward broke; the next test's must not.
    torch._dynamo.reset()


FRESH = """
import sys, torch
assert not any(name.startswith("evdit_opt") for name in sys.modules)
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU()).eval()
x = torch.randn(2, 3)
compiled = torch.compile(model, backend="evdit", options={"inner": "eager"})
with torch.no_grad():
    assert torch.equal(compiled(x), model(x))
assert "evdit_opt.backend" in sys.modules
print("dense and exact")
"""


def compiled(model: ToyDiT, **options: object) -> torch.Tensor:
    fast = torch.compile(model, backend=evdit, options={"inner": "eager", **options})
    with torch.no_grad():
        return fast(**toy_inputs())


def test_a_fresh_process_finds_the_backend_by_name(tmp_path: Path) -> None:
    assert "evdit" in entry_points(group="torch_dynamo_backends").names, (
        "the package is not installed, so torch cannot find its backend: pip install -e ."
    )
    run = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "dense and exact" in run.stdout
    assert run.stderr.count("got no plan") == 1, run.stderr


def test_without_a_plan_it_is_dense_and_says_once_how_to_get_one(caplog) -> None:
    model = toy()
    with torch.no_grad():
        dense = model(**toy_inputs())
    backend._say_dense.cache_clear()
    with caplog.at_level(logging.WARNING, "evdit_opt.backend"):
        assert torch.equal(compiled(model), dense)
        assert torch.equal(compiled(toy()), dense)
    (message,) = [r.getMessage() for r in caplog.records if r.name == "evdit_opt.backend"]
    assert "make_plan" in message


@pytest.mark.parametrize("as_path", [False, True], ids=["plan", "path"])
def test_a_plan_without_marks_works_on_a_whole_graph(as_path: bool, tmp_path: Path) -> None:
    model, rules = toy(), toy_rules()
    plan = make_plan(model, rules)
    plan.save(tmp_path / "plan.json")
    with torch.no_grad(), masked_attention(model, rules, TokenLayout(GRID)):
        expected = model(**toy_inputs())
    out = compiled(model, plan=tmp_path / "plan.json" if as_path else plan)
    assert (out - expected).abs().max() < CLOSE


@pytest.mark.parametrize("layout", [GRID, TokenLayout(GRID)], ids=["grid", "layout"])
def test_the_callers_layout_is_used_where_the_graph_does_not_tell(layout: object) -> None:
    model, rules = toy(), toy_rules()
    blind = type(SOURCE)(kind="arguments", input="hidden_states", patch=(1, 1, 1), dims=(2, 3, 4))
    plan = make_plan(model, rules, source=blind)
    with torch.no_grad(), masked_attention(model, rules, TokenLayout(GRID)):
        expected = model(**toy_inputs())
    assert (compiled(model, plan=plan, layout=layout) - expected).abs().max() < CLOSE
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="VideoGrid") as failure:
        compiled(model, plan=plan)
    assert isinstance(failure.value.inner_exception, LayoutError)


def test_a_planned_site_outside_the_graph_is_an_error_with_its_name() -> None:
    model = toy()
    plan = make_plan(model, {"blocks.0.attn1": Rule(1), "blocks.7.attn1": Rule(1)})
    with pytest.raises(BackendCompilerFailed, match=r"blocks\.7\.attn1.*apply_plan") as failure:
        compiled(model, plan=plan)
    assert isinstance(failure.value.inner_exception, PlanMismatchError)


def test_a_model_captured_in_parts_is_an_error_that_points_to_apply_plan() -> None:
    model = toy(breaks=True)
    plan = make_plan(model, toy_rules())
    with pytest.raises(BackendCompilerFailed, match="apply_plan"):
        compiled(model, plan=plan)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UnsupportedInputError, match="got max_autotune; Inductor's"):
        Options.parse({"max_autotune": True}, None)


def test_a_mode_becomes_inductor_options_and_explicit_ones_win() -> None:
    parsed = Options.parse({"inductor": {"max_autotune": False}}, "max-autotune")
    assert parsed.inductor["max_autotune"] is False
    assert len(parsed.inductor) > 1
    assert Options.parse(None, "default") == Options()


def test_the_inner_backend_may_be_any(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def own(gm, example_inputs):
        seen.append(gm)
        return gm.forward

    model, rules = toy(), toy_rules()
    plan = make_plan(model, rules)
    first = compiled(model, plan=plan, inner=own)
    torch._dynamo.reset()
    second = compiled(model, plan=plan, inner="aot_eager")
    assert len(seen) == 1
    assert (first - second).abs().max() < CLOSE
