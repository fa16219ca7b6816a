"""The package's sources in Inductor's cache key, and warm starts."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from evdit_opt import backend
from evdit_opt.apply import apply_plan
from evdit_opt.backend import source_hash
from evdit_opt.masks import Rule
from evdit_opt.passes.cache_key import SLOT, with_source_key
from evdit_opt.plan import Plan
from tests.models.toy_dit import make_plan, toy, toy_inputs


def test_inductors_cache_key_depends_on_the_sources() -> None:
    from torch._inductor import config
    from torch._inductor.codecache import FxGraphCachePickler, FxGraphHashDetails

    gm = torch.fx.symbolic_trace(torch.nn.Identity())

    def key(source: str) -> str:
        with config.patch(with_source_key({}, source)):
            return FxGraphCachePickler(gm).get_hash(FxGraphHashDetails(gm, [], {}, []))

    assert key(source_hash()) == key(source_hash())
    assert key(source_hash()) != key("of edited sources")


def test_a_users_own_inductor_pass_still_runs_and_counts() -> None:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Own(CustomGraphPass):
        seen: torch.fx.Graph | None = None

        def __call__(self, graph: torch.fx.Graph) -> None:
            self.seen = graph

        def uuid(self) -> str:
            return "own"

    own, graph = Own(), torch.fx.Graph()
    wrapped = with_source_key({SLOT: own}, "hash")[SLOT]
    wrapped(graph)
    assert own.seen is graph
    assert "own" in wrapped.uuid()


@pytest.fixture
def compile_toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[str, Tensor]]]:
    """Compiles the toy as a new process would: whether the cache knew the graph, and the output."""
    from torch._inductor.utils import fresh_cache

    def compile_it(plan: Plan, *, sources: str = "sources", impl: str = "masked") -> Any:
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr(backend, "source_hash", lambda: sources)
        model = toy(1)
        apply_plan(model, plan, impl=impl)
        with torch.no_grad():
            output = model(**toy_inputs())
        found = {
            what
            for what in ("hit", "miss", "bypass")
            if counters["aot_autograd"][f"autograd_cache_{what}"]
        }
        assert len(found) == 1, found
        return found.pop(), output

    with fresh_cache():
        yield compile_it
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", ["masked", "decomposed", "reference"])
def test_a_warm_start_traces_and_compiles_nothing(compile_toy: Any, impl: str) -> None:
    plan = make_plan(toy(1), {"blocks.0.attn1": Rule(1)})
    cold, output = compile_toy(plan, impl=impl)
    told = replace(plan.sites[0], reason="for another reason", density=0.4)
    warm, again = compile_toy(replace(plan, sites=(told,)), impl=impl)
    assert (cold, warm) == ("miss", "hit")
    assert torch.equal(output, again)


def test_another_plan_or_other_sources_are_compiled_anew(compile_toy: Any) -> None:
    plan = make_plan(toy(1), {"blocks.0.attn1": Rule(1)})
    other = make_plan(toy(1), {"blocks.0.attn1": Rule(1, weighting="balanced")})
    calls = [{"plan": plan}, {"plan": other}, {"plan": plan, "sources": "edited"}]
    cold, warm = ([compile_toy(**call) for call in calls] for _ in range(2))
    assert [found for found, _ in cold] == ["miss", "miss", "miss"]
    assert [found for found, _ in warm] == ["hit", "hit", "hit"]
    for (_, first), (_, second) in zip(cold, warm, strict=True):
        assert torch.equal(first, second)
    assert not torch.allclose(cold[0][1], cold[1][1])
