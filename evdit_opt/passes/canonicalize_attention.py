"""Turn the ways to write attention into one, a ``scaled_dot_product_attention`` node."""

from collections.abc import Callable, Iterator

from torch import fx

from evdit_opt.passes.canonicalize_aten import canonicalize_aten
from evdit_opt.passes.canonicalize_flash import canonicalize_flash
from evdit_opt.passes.canonicalize_flex import canonicalize_flex
from evdit_opt.passes.canonicalize_mask import canonicalize_mask
from evdit_opt.passes.canonicalize_mha import canonicalize_mha
from evdit_opt.passes.canonicalize_softmax import canonicalize_softmax
from evdit_opt.passes.graph import subgraphs
from evdit_opt.passes.stand_in import StandIn

__all__ = ["canonicalize_attention", "canonicalize_graph"]

FORMS: tuple[Callable[[fx.Graph], Iterator[StandIn]], ...] = (
    canonicalize_aten,
    canonicalize_flash,
    canonicalize_flex,
    canonicalize_mha,
    canonicalize_softmax,
    canonicalize_mask,
)
"""In this order: what one makes, the next may simplify."""


def canonicalize_attention(gm: fx.GraphModule) -> list[StandIn]:
    """Run every form on a graph and its subgraphs.

    Args:
        gm: Dynamo's graph; edited in place.

    Returns:
        What stands in for what; hand it to ``settle`` once the sites are rewritten.
    """
    return [entry for body in subgraphs(gm) for entry in canonicalize_graph(body.graph)]


def canonicalize_graph(graph: fx.Graph) -> list[StandIn]:
    """The same for one graph."""
    return [entry for form in FORMS for entry in form(graph)]
