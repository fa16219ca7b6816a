"""Everything that may be inspected, and what is said of what may not."""

import json
from pathlib import Path

import pytest
import torch

from evdit_opt import FewStepScheduler
from evdit_opt.demo.tinywan import WEIGHTS, load_tinywan
from evdit_opt.errors import UnsupportedInputError
from evdit_opt.inspection import load_target
from evdit_opt.models import as_denoiser, first_call

SIZES = {"num_frames": 3, "height": 8, "width": 12}


def test_a_pipeline_folder() -> None:
    denoiser = load_target(str(WEIGHTS), "a prompt", {"num_frames": 5, "height": 32, "width": 32})
    assert denoiser.makes_video
    _, call = first_call(denoiser)
    assert call["hidden_states"].shape[2:] == (3, 8, 8)


def test_a_pipeline_with_a_scheduler_for_few_steps() -> None:
    pipe = load_tinywan()
    pipe.scheduler = FewStepScheduler(pipe.scheduler, steps=6)
    denoiser = as_denoiser(pipe, ["a prompt"], {"num_frames": 5, "height": 32, "width": 32})
    _, call = first_call(denoiser)
    assert float(call["timestep"].max()) == pipe.scheduler.timesteps[0]


def test_a_transformer_folder_is_called_at_random() -> None:
    denoiser = load_target(str(WEIGHTS / "transformer"), sizes=SIZES, dtype=torch.bfloat16)
    assert not denoiser.makes_video
    _, call = first_call(denoiser)
    assert call["hidden_states"].shape == (1, 8, 3, 8, 12)
    assert call["hidden_states"].dtype == torch.bfloat16
    weights = denoiser.model.state_dict()
    assert float(weights["blocks.0.attn1.to_q.weight"].float().std()) > 0
    with torch.no_grad():
        assert torch.isfinite(denoiser.model(**call)[0]).all()


def test_a_config_alone_and_a_subfolder_will_do(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    config = (WEIGHTS / "transformer/config.json").read_text()
    (tmp_path / "transformer/config.json").write_text(config)
    denoiser = load_target(str(tmp_path), sizes=SIZES)
    assert type(denoiser.model).__name__ == "WanTransformer3DModel"


def test_a_function() -> None:
    denoiser = load_target("tests.inspection.toys:good")
    assert type(denoiser.model).__name__ == "ToyDiT"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.inspection.toys:absent", "no attribute 'absent'"),
        ("tests.inspection.absent:good", "No module named"),
        ("tests.inspection.toys:CONSTANT", "to be a function, got int"),
        ("tests.inspection.toys:wrong", "expected a diffusers pipeline"),
        ("tests.inspection.toys:wrong_pair", r"got \(int, int\)"),
        ("/no/such/folder", "expected a folder or Hugging Face id"),
    ],
)
def test_what_is_none_of_these_says_so(name: str, message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        load_target(name)


@pytest.mark.parametrize("changed", [{"sizes": SIZES}, {"device": "cpu"}], ids=["sizes", "device"])
def test_a_call_of_its_own_is_not_changed(changed) -> None:
    with pytest.raises(UnsupportedInputError, match=r"returned a call with"):
        load_target("tests.inspection.toys:good", **changed)


@pytest.mark.parametrize("config", ["{", '{"_class_name": "NoSuchModel"}', "{}"])
def test_a_folder_diffusers_cannot_load(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UnsupportedInputError, match="to hold a transformer of diffusers"):
        load_target(str(tmp_path))


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UnsupportedInputError, match="'cuda' does not"):
        load_target(str(WEIGHTS / "transformer"), sizes=SIZES, device="cuda")


def test_sizes_that_no_patch_divides(tmp_path: Path) -> None:
    config = json.loads((WEIGHTS / "transformer/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "in_channels": None}))
    with pytest.raises(UnsupportedInputError):
        load_target(str(tmp_path))
