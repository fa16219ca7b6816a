"""Steps of a model whose calls have several noise levels, as where frames are conditioned on."""

import logging

import pytest
import torch

from evdit_opt.calibrate.steps import Steps
from evdit_opt.errors import UnsupportedInputError
from evdit_opt.models import Denoiser
from tests.models.timed_toy import conditioning, timed_toy

LEVELS = torch.tensor([0.0, 900.0])


def steps(needed: bool) -> Steps:
    denoiser = Denoiser(timed_toy(1), ("a prompt",), lambda *_: torch.ones(1), makes_video=True)
    return Steps(denoiser, "hidden_states", needed=needed)


def test_where_residuals_are_reused_they_are_an_error() -> None:
    with pytest.raises(UnsupportedInputError, match=r"Config\(reuse=False\) does without"):
        steps(needed=True).listen({**conditioning(), "timestep": LEVELS})


def test_elsewhere_steps_are_not_told_apart_and_that_is_said(caplog) -> None:
    found = steps(needed=False)
    assert found.timed
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found.listen({**conditioning(), "timestep": LEVELS})
    assert (found.timed, found.step, found.branch, found.branches) == (False, 0, 0, 1)
    assert caplog.text.count("not told apart") == 1
