"""What an inspection says of a model, for people and as JSON."""

import io
import json

import pytest
import torch
from rich.console import Console

from evdit_opt.apply import apply_plan
from evdit_opt.errors import AlreadyOptimizedError
from evdit_opt.inspection import examine, show
from evdit_opt.inspection.examine import Inspection
from evdit_opt.models import as_denoiser
from tests.models.branching_dit import branching
from tests.models.small_models import BY_NAME
from tests.models.toy_dit import GRID, ToyDiT, make_plan, toy, toy_inputs, toy_rules


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


def inspected(model: ToyDiT, timing: bool = False) -> Inspection:
    return examine("a test", as_denoiser(model, [toy_inputs()]), timing=timing)


def text_of(inspection: Inspection) -> str:
    console = Console(width=300, file=io.StringIO())
    with console.capture() as captured:
        console.print(show(inspection))
    return " ".join(captured.get().split())


def test_sites_and_what_is_left_alone() -> None:
    found = inspected(toy())
    assert [seen.name for seen in found.sites] == ["blocks.0.attn1", "blocks.1.attn1"]
    left = [seen for seen in found.attentions if not seen.site]
    assert [seen.name for seen in left] == ["blocks.0.attn2", "blocks.1.attn2"]
    assert all(seen.reason.startswith("cross-attention") for seen in left)
    assert (found.grid, found.fullgraph, found.graphs, found.graph_breaks) == (GRID, True, 1, ())
    assert all((seen.prefix, seen.suffix) == (0, 0) for seen in found.sites)
    text = text_of(found)
    assert "2 sites, 4 latent frames x 2 x 3 tokens" in text
    assert "one graph" in text
    assert "not measured" in text


def test_breaks_and_scopes_are_shown() -> None:
    found = inspected(branching())
    assert {seen.way for seen in found.sites} == {"scope"}
    assert [broken.code for broken in found.graph_breaks] == ["if torch.any(q.isnan()):"]
    text = text_of(found)
    assert f"branching_dit.py:{found.graph_breaks[0].line} if torch.any(q.isnan()):" in text
    assert "Data-dependent branching" in text
    assert "reached in a scope" in text


def test_json_is_one_object_that_says_the_same() -> None:
    found = inspected(toy(1), timing=True)
    told = json.loads(found.to_json())
    assert told["model"] == "ToyDiT"
    assert told["grid"] == {"frames": 4, "height": 2, "width": 3}
    assert [seen["site"] for seen in told["attentions"]] == [True, False]
    assert 0 <= told["attention"]["share"] < 1
    assert told["attention"]["max_speedup"] >= 1
    assert told["versions"]["torch"]
    assert f"{told['attention']['max_speedup']:.2f}x faster" in text_of(found)


def test_a_model_without_sites_is_described_all_the_same() -> None:
    case = BY_NAME["latte"]
    found = examine("latte", as_denoiser(case.model(), [case.inputs()]))
    assert found.sites == ()
    assert found.attention is None
    assert found.attentions
    assert all(seen.reason for seen in found.attentions)
    assert "no speedup is possible" in text_of(found)


def test_an_unknown_grid_is_the_reason_of_every_site() -> None:
    case = BY_NAME["minimax_h3"]
    denoiser = as_denoiser(case.model(), [case.inputs()])
    found = examine("tokens", denoiser)
    assert found.sites == ()
    assert any("give Config.grid" in seen.reason for seen in found.attentions)
    torch._dynamo.reset()
    assert examine("tokens", denoiser, GRID_OF_CASES, timing=False).sites


GRID_OF_CASES = BY_NAME["minimax_h3"].layouts().popitem()[1].grid


def test_an_optimized_model_is_refused() -> None:
    model = toy()
    apply_plan(model, make_plan(model, toy_rules()), inner="eager")
    with pytest.raises(AlreadyOptimizedError, match="restore"):
        inspected(model)
