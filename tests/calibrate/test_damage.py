"""Damage of one step at one site."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.calibrate.damage import TEMPORAL, damage_of

errors = st.floats(0.0, 10.0)


@given(errors, errors)
def test_it_is_the_length_of_both_errors(output: float, temporal: float) -> None:
    damage = damage_of(output**2, temporal**2)
    assert damage**2 == pytest.approx(output**2 + TEMPORAL * temporal**2)
    assert damage_of((2 * output) ** 2, (2 * temporal) ** 2) == pytest.approx(2 * damage)


def test_tensors_and_numbers_agree() -> None:
    output, temporal = torch.rand(3, 4).double(), torch.rand(3, 4).double()
    own = damage_of(output, temporal)
    assert own[1, 2] == pytest.approx(damage_of(float(output[1, 2]), float(temporal[1, 2])))
