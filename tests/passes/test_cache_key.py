"""The package's sources in Inductor's cache key."""

import torch

from evdit_opt.backend import source_hash
from evdit_opt.passes.cache_key import SLOT, with_source_key


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
