"""Every video transformer of diffusers: which layers are found, and where their tokens lie."""

import json
from pathlib import Path

import pytest

from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.errors import LayoutError, NoVideoAttentionError
from evdit_opt.models import as_denoiser
from tests.models.case import Case, Shape
from tests.models.detection import SHAPES, detection
from tests.models.small_models import BY_NAME, CASES
from tests.often import often

RESULTS = Path(__file__).parents[2] / "benchmarks/results/cpu/models.json"
RECORDED = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
"""What docs/models.md says."""

# Where convolutions mix tokens before the first attention, only the length can be checked.
MIXES_EARLY = {"sana_wm"}


# Four times the same would be most of the time that all tests of models take.
EVERY = {f"{case.name}-{size}": (case, size, SHAPES[size]) for case in CASES for size in SHAPES}
# Slow, and their attention is that of another model.
SLOW = {
    "consisid",
    "framepack",
    "hunyuan_i2v",
    "kandinsky6",
    "motif_xattn",
    "sana_wm",
    "wan_animate",
}
OFTEN = [
    name for name, (case, size, _) in EVERY.items() if size == "usual" and case.name not in SLOW
]


@pytest.mark.parametrize(("case", "size", "shape"), often(OFTEN, EVERY))
def test_expected_sites_are_found_and_no_others(case: Case, size: str, shape: Shape) -> None:
    recorded = RECORDED[case.name]["detection"][size]
    model, call = case.model(shape), case.inputs(shape)
    denoiser = as_denoiser(model, [call])
    if case.refused:
        with pytest.raises((NoVideoAttentionError, LayoutError), match=case.refused) as caught:
            survey_attention(denoiser)
        assert detection(case, shape, caught.value) == recorded
        return
    grid = shape.grid if case.source is None else None
    found = survey_attention(denoiser, grid)
    assert dict(found.layouts) == case.layouts(shape)
    assert tuple(found.layouts) == tuple(case.layouts(shape))
    assert (found.grid, found.grid_source) == (shape.grid, case.grid_source(shape))
    assert found.fullgraph == case.fullgraph
    assert all(found.refused.values()), "every attention left alone has a reason"
    evidence = "length" if case.name in MIXES_EARLY else "probe"
    assert set(found.evidence.values()) == {evidence}
    assert detection(case, shape, found) == recorded, "run benchmarks/models/measure_models.py"


@pytest.mark.parametrize("name", ["joyimage_plus", "minimax_h3", "sana_wm_refiner"])
def test_a_model_that_takes_tokens_only_needs_the_callers_word(name: str) -> None:
    case = BY_NAME[name]
    denoiser = as_denoiser(case.model(), [case.inputs()])
    with pytest.raises(LayoutError, match=r"give Config\.grid"):
        survey_attention(denoiser)
