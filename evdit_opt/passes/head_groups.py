"""One attention as two, by heads: some follow one rule, the others another.

Heads are taken in runs of neighbours, so a group that lies together is a view and nothing is
copied, and no index tensor gets into a graph.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import getitem
from typing import Any

import torch

from evdit_opt.passes.graph import Attention, value_of

__all__ = ["attend_in_groups"]


def _now(target: Callable[..., Any], *arguments: Any) -> Any:
    return target(*arguments)


def attend_in_groups(
    attention: Attention,
    second: Sequence[int],
    attend: Callable[[Attention, bool], Any],
    call: Callable[..., Any] = _now,
) -> Any:
    """Attend with each group of heads on its own, and put the heads back in order.

    Args:
        attention: its arguments, tensors or nodes: q, k and v ``[batch, heads, seq, head_dim]``
            with as many heads each, ``attn_mask`` None or ``[batch | 1, heads | 1, 1, seq]``.
        second: the heads of the second group, ascending; neither none nor all.
        attend: the output of a group's attention; told whether it is the second group.
        call: ``call(target, *arguments)``: calls a function now, or adds the call to a graph.

    Returns:
        The output of all heads, like q.
    """
    heads = int(value_of(attention.q).shape[1])
    chosen = set(second)
    runs = [(own, len(list(run))) for own, run in groupby(n in chosen for n in range(heads))]
    lengths = [length for _, length in runs]

    def split(x: Any) -> tuple[Any, Any]:
        """The heads of both groups, each joined."""
        parts = call(torch.split, x, lengths, 1)
        each = [call(getitem, parts, n) for n in range(len(runs))]
        found = []
        for wanted in (False, True):
            own = [part for part, (group, _) in zip(each, runs, strict=True) if group is wanted]
            found.append(own[0] if len(own) == 1 else call(torch.cat, own, 1))
        return found[0], found[1]

    q, k, v = split(attention.q), split(attention.k), split(attention.v)
    mask = attention.attn_mask, attention.attn_mask
    if attention.attn_mask is not None and value_of(attention.attn_mask).shape[1] != 1:
        mask = split(attention.attn_mask)
    pieces: dict[int, Any] = {}
    for group in (False, True):
        own = attention._replace(q=q[group], k=k[group], v=v[group], attn_mask=mask[group])
        out = attend(own, group)
        places = [n for n, (which, _) in enumerate(runs) if which is group]
        if len(places) == 1:
            pieces[places[0]] = out
            continue
        parts = call(torch.split, out, [lengths[n] for n in places], 1)
        pieces |= {n: call(getitem, parts, place) for place, n in enumerate(places)}
    return call(torch.cat, [pieces[n] for n in range(len(runs))], 1)
