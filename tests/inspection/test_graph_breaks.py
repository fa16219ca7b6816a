"""Graph breaks with their source lines, also those that `torch._dynamo.explain` does not list."""

import inspect
import logging
from pathlib import Path

import pytest
import torch

from evdit_opt.inspection.graph_breaks import LOGGERS, read_break, recorded_breaks
from evdit_opt.passes.find_attention import find_attention
from tests.models import branching_dit, toy_dit
from tests.models.branching_dit import branching
from tests.models.toy_dit import toy, toy_inputs


def line_of(module, code: str) -> int:
    lines = inspect.getsource(module).splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip() == code)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model", "module", "code", "words"),
    [
        (toy(breaks=True), toy_dit, "torch._dynamo.graph_break()", "graph_break"),
        (branching(), branching_dit, "if torch.any(q.isnan()):", "Data-dependent branching"),
    ],
    ids=["in a loop over blocks", "on data"],
)
def test_a_break_is_told_once_with_its_line_and_reason(model, module, code, words) -> None:
    with recorded_breaks() as breaks:
        sites = find_attention(model, (), toy_inputs())
    assert not sites.fullgraph
    (found,) = breaks.values()
    assert Path(found.file) == Path(module.__file__)
    assert (found.line, found.code) == (line_of(module, code), code)
    assert words in found.reason
    assert found.whole_function, "Dynamo gives up the loop around it"


def test_a_model_in_one_graph_has_no_breaks() -> None:
    with recorded_breaks() as breaks:
        find_attention(toy(), (), toy_inputs())
    assert breaks == {}


def test_the_logs_are_left_as_they_were() -> None:
    loggers = [logging.getLogger(f"{name}.__graph_breaks") for name in LOGGERS]
    before = [(x.level, x.propagate, list(x.handlers)) for x in loggers]
    with pytest.raises(ValueError, match="mine"), recorded_breaks():
        raise ValueError("mine")
    assert [(x.level, x.propagate, list(x.handlers)) for x in loggers] == before


def test_other_messages_are_no_breaks() -> None:
    assert read_break("Graph break: something new") is None


def test_a_function_that_is_skipped_is_a_break_too() -> None:
    message = (
        "Graph break: torch.compile cannot properly resume from this graph break, which results in "
        "a skip.\ntorch.compile will skip tracing the frame f and fall back to eager.\n"
        'The graph break occurred in the following user code:\n  File "a.py", line 3, in f\n'
    )
    found = read_break(message)
    assert found is not None
    assert (found.file, found.line, found.whole_function) == ("a.py", 3, True)
