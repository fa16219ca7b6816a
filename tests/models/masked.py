"""An independent way to run a model with tile masks: eager, with dense masks, no compiler."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from evdit_opt.grid import TokenLayout
from evdit_opt.masks import Rule


@contextmanager
def masked_attention(
    model: nn.Module,
    rules: dict[str, Rule],
    layout: TokenLayout | Mapping[str, TokenLayout],
    order: str = "",
) -> Iterator[dict[str, int]]:
    """Run ``model`` eagerly with the rules as dense masks; yields how often each site was masked.

    Nothing of the compiler is used: the module that is running is known from hooks, and the builtin
    is replaced. Self-attention of a site is recognised by its length; text behind the video may be
    shorter than the layout says, where a model attends sample by sample.

    Args:
        model: the dense model.
        rules: rule per site.
        layout: layout of all sites, or of each.
        order: "backwards" sums over the keys from the last to the first, "rotated" begins in their
            middle: the same result but for rounding.
    """
    layouts = dict.fromkeys(rules, layout) if isinstance(layout, TokenLayout) else layout
    running: list[str] = []
    applied = dict.fromkeys(rules, 0)
    dense = F.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        fitting = fit(layouts[running[-1]], query.shape[2]) if running else None
        if fitting is not None and query.shape[2] == key.shape[2]:
            applied[running[-1]] += 1
            rule = rules[running[-1]]
            bias = rule.mask(fitting.grid.frames).expand(fitting).to(query.dtype)
            if attn_mask is None:
                attn_mask = bias
            elif attn_mask.dtype == torch.bool:
                attn_mask = bias.masked_fill(~attn_mask, float("-inf"))
            else:
                attn_mask = attn_mask + bias
            if order == "backwards":
                key, value, attn_mask = key.flip(2), value.flip(2), attn_mask.flip(-1)
            if order == "rotated":
                half = key.shape[2] // 2
                key, value = key.roll(half, 2), value.roll(half, 2)
                attn_mask = attn_mask.roll(half, -1)
        return dense(query, key, value, attn_mask, **kwargs)

    handles = []
    for name in rules:
        module = model.get_submodule(name)
        enter = lambda _module, _args, site=name: running.append(site)  # noqa: E731
        leave = lambda *_: (running.pop(), None)[1]  # noqa: E731
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            yield applied
    finally:
        for handle in handles:
            handle.remove()


def fit(layout: TokenLayout, length: int) -> TokenLayout | None:
    """The layout of a sequence of that length; None if it holds no such video."""
    shorter = layout.seq_len - length
    if not 0 <= shorter <= layout.suffix:
        return None
    return TokenLayout(layout.grid, layout.prefix, layout.suffix - shorter)
