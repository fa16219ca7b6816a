"""Find every attention of a model, and prove by dataflow which are 3D self-attention."""

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from evdit_opt.passes.canonicalize_attention import canonicalize_attention, canonicalize_graph
from evdit_opt.passes.capture import captured
from evdit_opt.passes.check_attention import mask_kind, unsupported
from evdit_opt.passes.eager_graph import eager_graph
from evdit_opt.passes.find_split_sites import find_split_sites
from evdit_opt.passes.graph import (
    LEFT_ALONE,
    REPLACED,
    SDPA,
    SPELLED,
    Attention,
    copy_graph,
    is_attention,
    layer_fqn,
    operation,
    read_attention,
    subgraphs,
    value_of,
    walk_back,
)
from evdit_opt.passes.site_mark import Way
from evdit_opt.passes.trace_origin import Origin, common_origin, is_parameter, trace_origins
from evdit_opt.passes.video_input import video_input

__all__ = ["AttentionSite", "Sites", "classify", "classify_eager", "find_attention"]

NAMELESS = (
    "its module is unknown, Dynamo lost the name (of an exported model there is none to begin "
    "with: make the plan on the model itself)"
)


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention call of a model.

    Attributes:
        name: path of the module that projects q, k, v and attends: what a plan calls the site. For
            an attention left alone, the path of the module it was found in.
        is_site: True if it is 3D self-attention as far as the graph can tell.
        reason: why it is, or is not.
        q_len: query tokens; None if known at run time only.
        kv_len: key tokens; None if known at run time only.
        batch: first dimension of q.
        heads: query heads.
        kv_heads: key heads.
        head_dim: size of a head; 0 if it is not known.
        causal: True if causal.
        mask_kind: "none", "key padding" (kept) or "other" (refused).
        spelled: True if it does not call ``scaled_dot_product_attention``.
        way: how a plan reaches it: by a mark, or in a scope; see ``passes.scopes``.
    """

    name: str
    is_site: bool
    reason: str
    q_len: int | None
    kv_len: int | None
    batch: int | None
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    mask_kind: str
    spelled: bool = False
    way: Way = "mark"


@dataclass(frozen=True)
class Sites:
    """Every attention of a model, in the order it runs.

    Attributes:
        attentions: all of them, those left alone too.
        fullgraph: True if Dynamo captured the model as one graph.
        graphs: how many graphs it made.
    """

    attentions: tuple[AttentionSite, ...]
    fullgraph: bool
    graphs: int

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths of the sites, each once."""
        return tuple(dict.fromkeys(found.name for found in self.attentions if found.is_site))

    @property
    def scoped(self) -> tuple[str, ...]:
        """Module paths of the sites that are reached in a scope."""
        scoped = (found.name for found in self.attentions if found.is_site and found.way == "scope")
        return tuple(dict.fromkeys(scoped))

    @property
    def refused(self) -> dict[str, str]:
        """The reason of every attention that is not a site."""
        return {found.name: found.reason for found in self.attentions if not found.is_site}


def find_attention(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sites:
    """Capture one real call of ``model`` and classify every attention in it.

    Where Dynamo breaks the graph, layers can share one, and what feeds an attention can lie in
    another: the proof is then read off a recording of an eager call.

    Args:
        model: the denoiser, dense.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    names = {id(module): name for name, module in model.named_modules()}
    video = video_input(model, args, kwargs)
    found: list[AttentionSite] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        canonical = copy_graph(gm)
        canonicalize_attention(canonical)
        inputs = zip(canonical.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        videos = {node for node, value in inputs if value is video.tensor}
        for body in subgraphs(canonical):
            found.extend(classify(body.graph, names, video.batch, videos))
        return gm.forward  # type: ignore[no-any-return]

    with torch.no_grad(), captured(model, backend) as capture:
        model(*args, **kwargs)
    if not capture.fullgraph:
        found = classify_eager(model, args, kwargs)
    checked = tuple(_require_callable(site, model) for site in found)
    sites = Sites(checked, capture.fullgraph, capture.graphs)
    if sites.fullgraph or not sites.names:
        return sites
    split = find_split_sites(model, sites.names, args, kwargs)
    ways = tuple(_choose_way(site, split, checked) for site in checked)
    return replace(sites, attentions=ways)


def classify_eager(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[AttentionSite]:
    """Describe every attention of one eager call, for models that Dynamo captures in parts."""
    names = {id(module): name for name, module in model.named_modules()}
    video = video_input(model, args, kwargs)
    graph = eager_graph(model, args, kwargs)
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    # Placeholders of the call come first, in the order of its arguments.
    inputs = zip(graph.find_nodes(op="placeholder"), given, strict=False)
    videos = {node for node, value in inputs if value is video.tensor}
    canonicalize_graph(graph)
    return classify(graph, names, video.batch, videos)


def classify(
    graph: fx.Graph, names: Mapping[int, str] | None, batch: int, videos: Set[fx.Node] = frozenset()
) -> list[AttentionSite]:
    """Describe every attention of one of Dynamo's graphs.

    A site computes q, k and v from the same hidden states; these descend from the video; nothing is
    folded into the batch, nothing hides different keys from different queries.

    Args:
        graph: the graph, before any rewriting.
        names: ``id(module) -> path`` of the model.
        batch: batch size of the video input.
        videos: placeholders known to hold the video; every 5-D input counts too.
    """
    volumes = {
        node
        for node in graph.find_nodes(op="placeholder")
        if not is_parameter(node) and getattr(value_of(node), "ndim", 0) == 5
    }
    sites = []
    for node in graph.nodes:
        if REPLACED in node.meta:
            continue
        if node.target is SDPA:
            sites.append(_classify_call(node, names, batch, volumes | videos))
        elif is_attention(node) and "flex_attention" in str(node.target):
            sites.append(_leave_flex(node, names))
        elif LEFT_ALONE in node.meta:
            sites.append(_leave_spelled(node, names))
    return sites


def _classify_call(
    call: fx.Node, names: Mapping[int, str] | None, batch: int, videos: Set[fx.Node]
) -> AttentionSite:
    attention = read_attention(call)
    q, k = value_of(attention.q), value_of(attention.k)
    layer = layer_fqn(call, names)
    origins = trace_origins([attention.q, attention.k, attention.v])
    shared = common_origin(origins)
    reason = (
        unsupported(attention)
        or ("" if layer else NAMELESS)
        or _not_self(attention, origins, shared)
        or _not_video(shared, videos)
        or _folded(q, batch, origins[0], shared)
    )
    return AttentionSite(
        name=layer or "" if reason else _owner(layer or "", origins, shared, names),
        is_site=not reason,
        reason=reason or "q, k and v come from the same hidden states, these from the video",
        q_len=_known(q.shape[-2]),
        kv_len=_known(k.shape[-2]),
        batch=_known(q.shape[0]),
        heads=int(q.shape[1]) if q.ndim == 4 else 1,
        kv_heads=int(k.shape[1]) if k.ndim == 4 else 1,
        head_dim=int(q.shape[-1]),
        causal=attention.is_causal,
        mask_kind=mask_kind(attention),
        spelled=SPELLED in call.meta,
    )


def _not_self(attention: Attention, origins: Sequence[Origin], shared: Sequence[fx.Node]) -> str:
    q, k, _v = origins
    if not q.roots or not k.roots:
        return "q or k is not projected from hidden states"
    if not shared:
        return "cross-attention: q and k, v come from different hidden states"
    # Adapters (LoRA) give every projection a root of its own, so the sets need not be equal.
    lengths = [value_of(x).shape[2] for x in (attention.q, attention.k)]
    if q.roots != k.roots and (None in map(_known, lengths) or lengths[0] != lengths[1]):
        return (
            f"q and k share some hidden states only, and have {lengths[0]} and {lengths[1]} tokens"
        )
    return ""


def _not_video(shared: Sequence[fx.Node], videos: Set[fx.Node]) -> str:
    if not videos:
        return ""  # a graph of its own after a break: infer_layout's probe decides
    feeds = walk_back(shared, lambda node: node in videos)
    return "" if any(node in videos for node in feeds) else "does not descend from the video input"


def _folded(q: torch.Tensor, batch: int, origin: Origin, shared: Sequence[fx.Node]) -> str:
    size, length = _known(q.shape[0]), _known(q.shape[-2])
    if size is None or size <= batch:
        return ""
    # Heads may be folded into the batch; then the hidden states hold no more sequences than that.
    tokens = min(_tokens(root, origin.projections[root][0]) for root in shared)
    if length and tokens <= batch * length:
        return ""
    return f"frames or positions are folded into the batch ({size} instead of {batch})"


def _tokens(states: fx.Node, projection: fx.Node) -> int:
    """Tokens of all samples in hidden states, whatever their order of dimensions."""
    value = value_of(states)
    channels = value.shape[1 if operation(projection).startswith("conv") else -1]
    return int(value.numel() // channels)


def _owner(
    layer: str,
    origins: Sequence[Origin],
    shared: Sequence[fx.Node],
    names: Mapping[int, str] | None,
) -> str:
    """Path of the innermost module around the attention and the projections it shares."""
    paths = [layer.split(".")]
    for origin in origins:
        for root in shared:
            for projection in origin.projections[root]:
                path = layer_fqn(projection, names)
                if path:
                    paths.append(path.split("."))
    together = zip(*paths, strict=False)
    same = takewhile(lambda parts: len(set(parts)) == 1, together)
    return ".".join(parts[0] for parts in same)


def _require_callable(site: AttentionSite, model: nn.Module) -> AttentionSite:
    if not site.is_site:
        return site
    module = model.get_submodule(site.name)
    if site.name and type(module).forward is not nn.Module.forward:
        return site
    return replace(site, is_site=False, reason="no single module projects its q, k and v")


def _choose_way(
    site: AttentionSite, split: Collection[str], all_found: Sequence[AttentionSite]
) -> AttentionSite:
    if not site.is_site or site.name not in split:
        return site
    inside = [
        other.name
        for other in all_found
        if not other.is_site and f"{other.name}.".startswith(f"{site.name}.")
    ]
    problem = f"its module holds another attention ({inside[0]})" if inside else ""
    if site.spelled:
        problem = "it does not call scaled_dot_product_attention"
    if problem:
        reason = f"Dynamo breaks the graph between its projections and its attention, and {problem}"
        return replace(site, is_site=False, reason=reason)
    return replace(site, way="scope")


def _leave_flex(node: fx.Node, names: Mapping[int, str] | None) -> AttentionSite:
    q, k = (value_of(x) for x in node.args[:2])
    return AttentionSite(
        name=layer_fqn(node, names) or "",
        is_site=False,
        reason="flex_attention with a block mask of the model's own",
        q_len=_known(q.shape[2]),
        kv_len=_known(k.shape[2]),
        batch=_known(q.shape[0]),
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        head_dim=int(q.shape[3]),
        causal=False,
        mask_kind="other",
    )


def _leave_spelled(node: fx.Node, names: Mapping[int, str] | None) -> AttentionSite:
    value = value_of(node)  # weights [batch, (heads,) queries, keys]; several results of a call
    shape = value.shape if isinstance(value, torch.Tensor) else (None,) * 4
    *batch, queries, keys = map(_known, shape)
    heads = batch[1] if len(batch) > 1 else None
    return AttentionSite(
        name=layer_fqn(node, names) or "",
        is_site=False,
        reason=node.meta[LEFT_ALONE],
        q_len=queries,
        kv_len=keys,
        batch=batch[0],
        heads=heads or 1,
        kv_heads=heads or 1,
        head_dim=0,
        causal=False,
        mask_kind="other",
    )


def _known(size: int | torch.SymInt | None) -> int | None:
    if size is None or (isinstance(size, torch.SymInt) and not size.node.has_hint()):
        return None
    return int(size)
