"""Reuse with residuals of fewer bits: in the runtime, in plans, and chosen for a memory budget."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.calibrate.make import make_plan as calibrate
from evdit_opt.calibrate.record import Recording
from evdit_opt.calibrate.residual_memory import GIB, Fit, fit_residuals, residual_bytes
from evdit_opt.calibrate.stage import staged
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError, PlanError, UnsupportedInputError
from evdit_opt.grid import TokenLayout
from evdit_opt.kernels import residual as residual_module
from evdit_opt.kernels.residual import PRECISIONS, ROUNDING, Precision
from evdit_opt.masks import CACHED, Rule
from evdit_opt.models import Denoiser
from evdit_opt.plan import Plan
from evdit_opt.plan_diff import plan_differences
from evdit_opt.reuse import with_reuse
from tests.models.branching_dit import make_branching, scope_plan
from tests.models.timed_toy import CLOSE, TimedToy, call, conditioning
from tests.models.toy_dit import GRID, make_plan
from tests.plans import PLAN
from tests.short_tinywan import short_tinywan

SITE = "blocks.0.attn1"


class OneSite(TimedToy):
    """Returns what its one attention returns."""

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states * (1 + timestep.reshape(-1, 1, 1, 1, 1) / 500))
        return self.blocks[0].attn1(x.flatten(2).transpose(1, 2))


def one_site() -> OneSite:
    torch.manual_seed(0)
    return OneSite(1).eval()


def attended(model: OneSite, inputs: dict[str, Tensor], level: float, rule: Rule | None) -> Tensor:
    """``[batch, heads, seq, head_dim]`` in float64; None: dense."""
    attention = model.blocks[0].attn1
    with torch.no_grad():
        x = model.embed(inputs["hidden_states"] * (1 + level / 500)).flatten(2).transpose(1, 2)
        q, k, v = (
            own(x).unflatten(2, (2, -1)).transpose(1, 2).double()
            for own in (attention.q, attention.k, attention.v)
        )
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if rule is not None and rule.keeps_nothing:
        return torch.zeros_like(q)
    if rule is not None:
        logits += rule.mask(GRID.frames).expand(TokenLayout(GRID)).double()
    return logits.softmax(-1) @ v


def reused(model: OneSite, plan: Plan, inputs: dict[str, Tensor], way: str) -> Tensor:
    """The output of the step after a refresh."""
    if way == "rehearsed":
        branch = Denoiser(model, (0,), lambda *_: call(model, inputs, 900.0) * 0
                          + call(model, inputs, 800.0), makes_video=True)  # fmt: skip
        with staged(branch, {SITE: TokenLayout(GRID)}) as stage:
            return stage.rehearse(plan, [0], 0, 2)[0]
    if way in ("scope", "outside graphs"):
        make_branching(model, way == "outside graphs")
    apply_plan(model, plan, inner="inductor" if way == "inductor" else "eager")
    first = call(model, inputs, 900.0)
    dense = attended(model, inputs, 900.0, None).transpose(1, 2).flatten(2)
    assert (first - dense).abs().max() < CLOSE
    got = call(model, inputs, 800.0)
    kept = residual_module.bytes_of(dense.numel(), 4, plan.reuse.precision)
    scales = 4 * 2 * (plan.reuse.precision == "float8")  # two heads
    assert report(model).residual_bytes == kept + scales
    assert "residuals take 0.0 MiB" in report(model).show()
    restore(model)
    return got


@pytest.mark.parametrize("way", ["eager", "inductor", "scope", "outside graphs", "rehearsed"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", [Rule(0), CACHED], ids=["own frame", "whole output"])
def test_a_reused_output_is_off_by_the_rounding_of_its_residual(
    way: str, precision: Precision, rule: Rule
) -> None:
    model, inputs = one_site(), conditioning()
    scoped = way in ("scope", "outside graphs")
    plan = (scope_plan if scoped else make_plan)(model, {SITE: Rule(0)})
    plan = with_reuse(plan, (900.0,), rule=rule, precision=precision)
    residual = attended(model, inputs, 900.0, None) - attended(model, inputs, 900.0, rule)
    right = attended(model, inputs, 800.0, rule) + residual
    bound = residual.abs() * ROUNDING[precision] + CLOSE
    if precision == "float8":  # half a step of the smallest numbers
        bound += residual.abs().amax((2, 3), keepdim=True) * 2.0**-10 / 448
    got = reused(model, plan, inputs, way).unflatten(2, (2, -1)).transpose(1, 2)
    wrong = (got - right).abs()
    assert (wrong <= bound).all()
    assert (wrong.max() < CLOSE) == (precision == "model")


def test_the_precision_is_part_of_the_plan() -> None:
    assert '"precision"' not in PLAN.to_json()  # as plans were before
    plain = replace(PLAN, reuse=replace(PLAN.reuse, trend=()))
    small = replace(plain, reuse=replace(plain.reuse, precision="float8", memory=3 * 2**20))
    assert Plan.from_json(small.to_json()) == small
    assert small.fingerprint() != PLAN.fingerprint()
    assert replace(small, reuse=replace(small.reuse, memory=1)).fingerprint() == small.fingerprint()
    assert "residuals in precision float8, 3 MiB in a run" in small.describe()
    (difference,) = plan_differences(plain, small)
    assert difference.describe() == "plan: precision of residuals: model -> float8"
    text = small.to_json().replace('"float8"', '"int4"')
    with pytest.raises(PlanError, match=r"plan\.reuse\.precision to be one of model, bfloat16"):
        Plan.from_json(text)
    with pytest.raises(PlanError, match="precision"):
        replace(PLAN.reuse, precision="float4")
    with pytest.raises(PlanError, match="memory"):
        replace(PLAN.reuse, memory=-1)
    with pytest.raises(PlanError, match="no trend"):
        replace(PLAN.reuse, precision="float8")


def recording(sites: int = 4, branches: int = 2, itemsize: int = 4) -> Recording:
    """Residuals of 1 GiB a site and branch in float32."""
    names = [f"blocks.{n}.attn1" for n in range(sites)]
    some: Any = ("a rule",)
    return Recording(
        errors=dict.fromkeys(names, ()),
        reuse=dict.fromkeys(names, some),
        levels=(900.0, 800.0),
        branches=branches,
        residual_bytes=dict.fromkeys(names, GIB * itemsize // 4),
        itemsize=itemsize,
        mass={},
        results=(),
    )


@pytest.mark.parametrize(
    ("allowed", "itemsize", "precisions", "fit"),
    [
        (16.0, 4, PRECISIONS, Fit("model", True, 4)),
        (15.9, 4, PRECISIONS, Fit("bfloat16", True, 4)),
        (8.0, 4, ("model",), Fit("model", False, 4)),
        (7.9, 4, PRECISIONS, Fit("bfloat16", False, 4)),
        (3.9, 4, PRECISIONS, Fit("float8", False, 4)),
        (1.6, 4, PRECISIONS, Fit("float8", False, 3)),
        (3.9, 4, ("model", "bfloat16"), Fit("bfloat16", False, 3)),
        (0.1, 4, PRECISIONS, Fit("model", False, 0)),
        (0.0, 4, PRECISIONS, Fit("model", False, 0)),
        (3.9, 2, PRECISIONS, Fit("float8", False, 4)),
        (4.0, 2, PRECISIONS, Fit("model", False, 4)),
    ],
    ids=[
        "all fit",
        "trend in bfloat16",
        "no trend",
        "bfloat16",
        "float8",
        "not all",
        "no float8",
        "none",
        "off",
        "half",
        "half fits",
    ],
)
def test_the_most_exact_precision_that_lets_all_sites_reuse(
    allowed: float, itemsize: int, precisions: Any, fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(reuse_memory=allowed, reuse_precisions=precisions)
    own = recording(itemsize=itemsize)
    with caplog.at_level(logging.INFO, "evdit_opt.calibrate.residual_memory"):
        assert fit_residuals(own, config, torch.nn.Linear(1, 1)) == fit
    assert (
        residual_bytes(own, list(own.errors)[: fit.sites], fit.precision, fit.trend)
        <= allowed * GIB
    )
    if allowed == 0.0:
        assert not caplog.records
        return
    (said,) = caplog.records
    assert "GiB in precision model" in said.message
    assert (said.levelname == "WARNING") == (fit.sites < 4)
    if fit.sites < 4:  # what it asks for is enough
        asked = float(said.message.split("reuse_memory=")[1].split(")")[0])
        enough = replace(config, reuse_memory=asked)
        assert fit_residuals(own, enough, torch.nn.Linear(1, 1)).sites == 4


def test_a_device_without_float8_keeps_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_module, "_lacks_float8", lambda _device: "too old")
    model, config = torch.nn.Linear(1, 1), Config(reuse_memory=1.6)
    assert fit_residuals(recording(), config, model) == Fit("bfloat16", False, 1)
    with pytest.raises(UnsupportedInputError, match="too old"):
        fit_residuals(recording(), replace(config, reuse_precisions=("float8",)), model)


def test_precisions_are_checked() -> None:
    for wrong in ((), ("float8", "float8"), ("int4",)):
        with pytest.raises(CalibrationError, match="reuse_precisions"):
            Config(reuse_precisions=wrong)  # type: ignore[arg-type]


def test_tinywan_is_calibrated_within_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    size = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16}
    pipe: Any = short_tinywan()
    layers, width = len(pipe.transformer.blocks), pipe.transformer.config
    numbers = 5 * 16 * width.num_attention_heads * width.attention_head_dim * layers * 2
    config = Config(
        density=0.5, calib_steps=4, trial_prompts=1, verify_prompts=0, min_tokens=0,
        references=(1,), windows=(0,), weightings=("none",), spacings=("paper",), progress=False,
        reuse_memory=1.5 * numbers / GIB, pipe_kwargs={**size, "guidance_scale": 2.0},
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "evdit_opt.calibrate.residual_memory"):
        plan = calibrate(pipe, ["a red ball", "a blue box"], config)
    assert plan.reuse.precision == "float8"
    assert f"{layers} sites and 2 guidance branches" in caplog.text
    reusing = len(plan.reuse.sites)
    assert plan.reuse.memory == numbers * reusing // layers
    assert plan.sites[0].error is None or plan.sites[0].error >= ROUNDING["float8"]
    apply_plan(pipe.transformer, plan, inner="eager")
    clip = pipe("a red ball", num_inference_steps=4, guidance_scale=2.0, output_type="latent",
                generator=torch.Generator().manual_seed(0), **size).frames  # fmt: skip
    assert torch.isfinite(clip).all()
    scales = 4 * width.num_attention_heads * reusing * 2
    assert report(pipe.transformer).residual_bytes == plan.reuse.memory + scales
