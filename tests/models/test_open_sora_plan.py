"""The paper's model: its parameters, its sites, and what it computes with a plan."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.models.open_sora_plan import FULL, SMALL, OpenSoraT2V, open_sora_call
from evdit_opt import Config, Plan, make_plan
from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.models import as_denoiser
from evdit_opt.passes.find_attention import find_attention
from evdit_opt.passes.infer_layout import infer_layout
from tests.models.branching_dit import scope_plan
from tests.models.case import patches
from tests.models.masked import masked_attention
from tests.often import often
from tests.tolerance import assert_close_to_fp64

GRID = VideoGrid(6, 3, 4)
TEXT = 7
SITES = tuple(f"transformer_blocks.{layer}.attn1" for layer in range(SMALL.num_layers))
RULES = dict(zip(SITES, (Rule(1), Rule(0, window=1), Rule(2, weighting="balanced")), strict=True))
PUBLIC_KEYS = Path(__file__).parent / "open_sora_plan_keys.json"

MASKS = {"ones": "ones", "padded": "padded", "None": None}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
some_masks = pytest.mark.parametrize("mask", often(["padded"], MASKS))


@pytest.fixture
def model() -> OpenSoraT2V:
    torch.manual_seed(0)
    return OpenSoraT2V(SMALL).eval()


def call_of(mask: str | None, grid: VideoGrid = GRID, batch: int = 1) -> dict[str, Any]:
    torch.manual_seed(1)
    size = (grid.frames, grid.height, grid.width)
    return open_sora_call(SMALL, size, text=TEXT, mask=mask, batch=batch)


def plan_of(model: OpenSoraT2V) -> Plan:
    return scope_plan(model, dict(RULES), source=patches(1, 2, 2), grid=GRID)


def masked(
    model: OpenSoraT2V, call: dict[str, Any], grid: VideoGrid, rules: dict[str, Rule]
) -> torch.Tensor:
    with masked_attention(model, rules, TokenLayout(grid)) as applied:
        out = model(**call)[0]
    assert all(applied.values()), applied
    return out


def assert_masked(
    actual: torch.Tensor,
    model: OpenSoraT2V,
    call: dict[str, Any],
    grid: VideoGrid = GRID,
    rules: dict[str, Rule] = RULES,
) -> None:
    """``actual`` is as close to the masked model in float64 as the masked model in float32 is."""
    exact = masked(copy.deepcopy(model).double(), as_double(call), grid, rules)
    eager = masked(model, call, grid, rules)
    assert_close_to_fp64(actual, exact, eager)
    assert (model(**call)[0] - exact).abs().max() > 1000 * (eager - exact).abs().max()


def as_double(call: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in call.items()
    }


def test_parameters_are_those_of_the_public_code() -> None:
    public = json.loads(PUBLIC_KEYS.read_text(encoding="utf-8"))
    expected = {
        name.format(layer=layer): shape
        for name, shape in public["shapes"].items()
        for layer in range(public["layers"])
    }
    with torch.device("meta"):
        full = OpenSoraT2V(FULL)
    assert {name: list(value.shape) for name, value in full.state_dict().items()} == expected
    assert sum(p.numel() for p in full.parameters()) == 2_771_907_856
    assert (FULL.num_layers, FULL.num_attention_heads, FULL.attention_head_dim) == (32, 24, 96)


@some_masks
def test_all_layers_are_found_and_nothing_else(model: OpenSoraT2V, mask: str | None) -> None:
    call = call_of(mask, batch=2)
    sites = find_attention(model, (), call)
    assert sites.names == SITES
    assert not sites.fullgraph  # the branch on the text mask of the cross-attention
    # Without a video mask nothing lies between the projections of a site and its attention.
    assert sites.scoped == (() if mask is None else SITES)
    assert {name.rsplit(".", 1)[1] for name in sites.refused} == {"attn2"}
    found = infer_layout(model, sites, (), call)
    assert (found.grid, found.source) == (GRID, patches(1, 2, 2))
    assert set(found.evidence.values()) == {"probe"}


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
@masks
@torch.no_grad()
def test_outputs_are_those_of_dense_masks(model: OpenSoraT2V, mask: str | None, inner: str) -> None:
    dense = model(**call_of(mask))[0]
    apply_plan(model, plan_of(model), inner=inner)
    out = model(**call_of(mask))[0]
    assert report(model).rewritten == SITES
    restore(model)
    assert torch.equal(model(**call_of(mask))[0], dense)
    assert_masked(out, model, call_of(mask))


@torch.no_grad()
def test_mask_resolution_length_and_batch_may_change_on_the_fly(model: OpenSoraT2V) -> None:
    runs = (
        (GRID, "ones", 1),
        (GRID, "padded", 1),
        (VideoGrid(6, 2, 5), "ones", 2),
        (VideoGrid(9, 3, 4), "padded", 2),
        (GRID, None, 1),
    )
    apply_plan(model, plan_of(model), inner="eager")
    outs = [model(**call_of(mask, grid, batch))[0] for grid, mask, batch in runs]
    restore(model)
    for out, (grid, mask, batch) in zip(outs, runs, strict=True):
        assert_masked(out, model, call_of(mask, grid, batch), grid)


@some_masks
@torch.no_grad()
def test_thirty_two_layers_each_with_its_mask(mask: str | None) -> None:
    torch.manual_seed(0)
    model = OpenSoraT2V(replace(SMALL, num_layers=FULL.num_layers)).eval()
    rules = {
        f"transformer_blocks.{layer}.attn1": (Rule(1), Rule(0, window=1), Rule(2))[layer % 3]
        for layer in range(FULL.num_layers)
    }
    apply_plan(model, scope_plan(model, rules, source=patches(1, 2, 2), grid=GRID), inner="eager")
    out = model(**call_of(mask))[0]
    assert report(model).rewritten == tuple(rules)
    assert report(model).graphs < 20  # one per distinct rule and graph break, not per layer
    restore(model)
    assert_masked(out, model, call_of(mask), rules=rules)


@pytest.mark.nightly
def test_calibration_from_start_to_end(model: OpenSoraT2V) -> None:
    config = Config(
        threshold=0.5, min_tokens=0, references=(1, 2), windows=(0,), spacings=("paper",),
        weightings=("none",), verify_prompts=1, progress=False,
    )  # fmt: skip
    plan = make_plan(model, [call_of("ones"), call_of("padded"), call_of("ones")], config)
    assert [site.name for site in plan.sites] == list(SITES)
    assert {site.way for site in plan.sites} == {"scope"}
    assert not plan.fullgraph
    assert Plan.from_json(plan.to_json()) == plan
    assert set(plan.rules) == set(SITES)
    assert plan.calibration.held_out_error is not None


@pytest.mark.parametrize("seed", often("0", {str(seed): seed for seed in range(3)}))
def test_interpolated_positions_and_shapes_of_other_configurations(seed: int) -> None:
    config = (
        replace(SMALL, num_layers=1, num_attention_heads=3, attention_head_dim=6),
        replace(SMALL, num_layers=2, in_channels=8, interpolation_scale=(1.0, 1.0, 1.0)),
        replace(SMALL, num_layers=5, num_attention_heads=1, attention_head_dim=24),
    )[seed]
    torch.manual_seed(seed)
    model = OpenSoraT2V(config).eval()
    call = open_sora_call(config, (4 + seed, 3, 2), text=5, mask="padded")
    sites = find_attention(model, (), call)
    assert sites.names == tuple(f"transformer_blocks.{n}.attn1" for n in range(config.num_layers))
    assert model(**call)[0].shape == call["hidden_states"].shape


class Pipeline:
    """What evdit_opt meets in the original pipeline: video in ``.images``, as bytes."""

    def __init__(self, transformer: OpenSoraT2V) -> None:
        self.transformer = transformer

    def __call__(self, prompt: str, num_inference_steps: int, generator: Any, **_: Any) -> Any:
        latents = call_of("ones")["hidden_states"][:, :3].movedim(1, -1)
        return SimpleNamespace(images=(latents.clamp(0, 1) * 255).to(torch.uint8))


def test_the_original_pipeline_s_output_is_understood(model: OpenSoraT2V) -> None:
    denoiser = as_denoiser(Pipeline(model), ["a dog"])
    video = denoiser.run("a dog", 0, 1)
    assert denoiser.model is model
    assert video.shape == (GRID.frames, 2 * GRID.height, 2 * GRID.width, 3)
    assert video.is_floating_point()
    assert 0.5 < video.max() <= 1
