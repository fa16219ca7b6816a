"""Running a model through a backend of ours, and what is left afterwards."""

import pytest
import torch
from torch import fx

from evdit_opt.passes.capture import captured
from tests.models.toy_dit import toy, toy_inputs


def test_the_model_is_called_through_the_backend_and_is_itself_again() -> None:
    model, graphs = toy(), []

    def backend(gm: fx.GraphModule, _inputs: list) -> object:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        dense = model(**toy_inputs())
        with captured(model, backend) as capture:
            assert torch.equal(model(**toy_inputs()), dense)
        assert capture.fullgraph
        assert len(graphs) == 1
        assert "_compiled_call_impl" not in vars(model)
        model(**toy_inputs())
    assert len(graphs) == 1


def test_a_model_that_breaks_the_graph_is_captured_in_parts() -> None:
    model, graphs = toy(breaks=True), []

    def backend(gm: fx.GraphModule, _inputs: list) -> object:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        dense = model(**toy_inputs())
        with captured(model, backend) as capture:
            assert torch.equal(model(**toy_inputs()), dense)
    assert not capture.fullgraph
    assert len(graphs) == 1, "Dynamo gives up on the loop, and both blocks share one graph"


def test_an_error_in_the_model_is_the_users_and_leaves_nothing_behind() -> None:
    model = toy()
    wrong = {"hidden_states": torch.randn(1, 3, 2, 4, 4), "text": torch.randn(1, 5, 8)}
    with (
        pytest.raises(Exception, match="channels"),
        captured(model, lambda gm, _inputs: gm.forward),
    ):
        model(**wrong)
    assert "_compiled_call_impl" not in vars(model)
