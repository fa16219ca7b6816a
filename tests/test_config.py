import dataclasses
from typing import Any

import pytest

from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError
from evdit_opt.quality import Measured, QualityReport


def test_the_defaults_are_valid_and_frozen() -> None:
    config = Config()
    assert dataclasses.replace(config, threshold=0.2).threshold == 0.2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 0.2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(0.1)  # type: ignore[misc]  # keywords only


def test_every_field_is_documented() -> None:
    for field in dataclasses.fields(Config):
        assert f"\n        {field.name}: " in (Config.__doc__ or ""), field.name


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": -0.1},
        {"threshold": float("nan")},
        {"threshold": float("inf")},
        {"threshold": True},
        {"threshold": "0.1"},
        {"density": 1.1},
        {"references": ()},
        {"references": [1, 2]},
        {"references": (1, 1)},
        {"references": (-1,)},
        {"references": (1.0,)},
        {"windows": (0, True)},
        {"weightings": ("heavy",)},
        {"spacings": ("random",)},
        {"max_density": 1.1},
        {"min_tokens": -1},
        {"calib_steps": 0},
        {"reuse": "yes"},
        {"reuse_memory": -1.0},
        {"trial_prompts": 0},
        {"verify_prompts": 1.5},
        {"seed": None},
        {"min_psnr": -1.0},
        {"min_ssim": 1.5},
        {"max_flicker_ratio": float("nan")},
        {"max_distinct_rules": 0},
        {"max_distinct_rules": 9},
        {"inner": ""},
        {"impl": "fastest"},
        {"progress": 1},
        {"pipe_kwargs": None},
        {"grid": (4, 2, 3)},
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(CalibrationError, match=rf"expected Config\.{name} to be .*, got"):
        Config(**arguments)


def report(psnr: float, ssim: float, flicker_ratio: float | None) -> QualityReport:
    flicker = None if flicker_ratio is None else Measured(mean=flicker_ratio, stderr=None)
    return QualityReport(
        clips=1,
        psnr=Measured(mean=psnr, stderr=None),
        ssim=Measured(mean=ssim, stderr=None),
        flicker_ratio=flicker,
        motion_consistency=Measured(mean=1.0, stderr=None),
    )


def test_missed_floors_are_named() -> None:
    config = Config(min_psnr=25.0, min_ssim=0.9, max_flicker_ratio=1.5)
    assert config.missed_floors(None) == ()
    assert config.missed_floors(report(25.0, 0.9, 1.5)) == ()
    assert config.missed_floors(report(25.0, 0.9, None)) == ()
    assert Config().missed_floors(report(0.0, 0.0, 99.0)) == ()
    missed = config.missed_floors(report(24.0, 0.8, 2.0))
    assert [words.split()[0] for words in missed] == ["PSNR", "SSIM", "flicker"]


def test_calibration_measures_no_kernels() -> None:
    assert Config().repeatable_impl == "static"
    assert Config(impl="decomposed").repeatable_impl == "decomposed"
