"""Calls made up from signature and config, and the models that run them."""

import pytest
import torch

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.inspection.random_call import random_call
from tests.models.case import Shape
from tests.models.small_models import BY_NAME

SHAPE = Shape()
SIZES = {"num_frames": 6, "height": 6, "width": 8, "text": 7}


@pytest.mark.parametrize(
    "name", ["wan", "skyreels", "cogvideox", "hunyuan", "ltx", "mochi", "allegro", "easyanimate"]
)
def test_a_made_up_call_runs(name: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    call = random_call(model, **SIZES)
    real = case.inputs()
    assert call["hidden_states"].ndim == real["hidden_states"].ndim
    with torch.no_grad():
        output = model(**call)[0]
    assert torch.isfinite(output).all()


def test_the_same_call_every_time() -> None:
    model = BY_NAME["wan"].model()
    first, second = (random_call(model, **SIZES)["hidden_states"] for _ in range(2))
    assert torch.equal(first, second)
    assert float(first.std()) > 0.5


def test_what_cannot_be_made_up_is_named() -> None:
    with pytest.raises(UnsupportedInputError, match=r"it takes 'r_timestep'.*module:factory"):
        random_call(BY_NAME["anyflow"].model(), **SIZES)


def test_latents_that_do_not_fit_are_told() -> None:
    with pytest.raises(UnsupportedInputError, match=r"took none of \[1, 4, 6, 5, 7\]"):
        random_call(BY_NAME["cogvideox"].model(), num_frames=6, height=5, width=7)
