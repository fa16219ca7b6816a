"""What may compile the rewritten graph, and what is said of the rest, before anything compiles."""

from functools import partial

import pytest
import torch

from evdit_opt import inner
from evdit_opt.apply import apply_plan, is_optimized
from evdit_opt.backend import Options
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError, UnsupportedInputError
from evdit_opt.inner import inner_name, wrong_inner
from tests.models.toy_dit import make_plan, toy, toy_rules


def own(gm: torch.fx.GraphModule, _inputs: list[object]) -> object:
    return gm.forward


GOOD = ("inductor", "eager", "aot_eager", "aot_eager_decomp_partition", own, partial(own))
BAD = ("", "evdit", "indcutor", None, 3)


@pytest.mark.parametrize("value", GOOD, ids=lambda value: inner_name(value))
def test_names_of_backends_and_functions_are_accepted(value: inner.Inner) -> None:
    assert wrong_inner(value) == ""
    assert Config(inner=value).inner == value
    assert Options.parse({"inner": value}, None).inner == value


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_anything_else_is_refused_at_once(value: object) -> None:
    with pytest.raises(CalibrationError, match=r"expected Config\.inner to be inductor"):
        Config(inner=value)
    with pytest.raises(UnsupportedInputError, match="expected inner to be inductor, eager"):
        Options.parse({"inner": value}, None)
    model = toy()
    with pytest.raises(UnsupportedInputError, match="expected inner to be inductor, eager"):
        apply_plan(model, make_plan(model, dict(toy_rules())), inner=value)
    assert not is_optimized(model)


def test_missing_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedInputError, match=r"pip install 'evdit-opt\[tensorrt\]'"):
        Options(inner="tensorrt")
    with pytest.raises(CalibrationError, match=r"pip install 'evdit-opt\[tensorrt\]'"):
        Config(inner="tensorrt")
    monkeypatch.setattr(inner, "find_spec", lambda name: name)
    assert wrong_inner("tensorrt") == ""


def test_names_for_people() -> None:
    assert inner_name("eager") == "eager"
    assert inner_name(own) == "own"
    assert inner_name(partial(own)) == "callable"
