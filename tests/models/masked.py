"""An independent way to run a model with tile masks: eager, with dense masks, no compiler."""

from collections.abc import Iterator
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
    model: nn.Module, rules: dict[str, Rule], layout: TokenLayout
) -> Iterator[dict[str, int]]:
    """Run ``model`` eagerly with the rules as dense masks; yields how often each site was masked.

    Nothing of the compiler is used: the module that is running is known from hooks, and the builtin
    is replaced. Self-attention of a site is recognised by its key length.
    """
    running: list[str] = []
    applied = dict.fromkeys(rules, 0)
    biases = {name: rule.mask(layout.grid.frames).expand(layout) for name, rule in rules.items()}
    dense = F.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        if running and key.shape[2] == layout.seq_len and query.shape[2] == layout.seq_len:
            applied[running[-1]] += 1
            bias = biases[running[-1]].to(query.dtype)
            if attn_mask is None:
                attn_mask = bias
            elif attn_mask.dtype == torch.bool:
                attn_mask = bias.masked_fill(~attn_mask, float("-inf"))
            else:
                attn_mask = attn_mask + bias
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
