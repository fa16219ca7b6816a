"""The toy with a noise level, its runs with reuse by a second implementation, uncompiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evdit_opt.grid import TokenLayout
from evdit_opt.masks import Rule
from evdit_opt.plan import Plan
from evdit_opt.reuse import with_reuse
from tests.models.toy_dit import GRID, ToyDiT, make_plan, toy_inputs, toy_rules

# float32 rounding of a different summation order, over the steps of a run.
CLOSE = 4e-6
LEVELS = (900.0, 800.0, 650.0, 400.0, 250.0, 100.0)


class TimedToy(ToyDiT):
    """The toy with a noise level, on which its attention depends."""

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(hidden_states * (1 + timestep.reshape(-1, 1, 1, 1, 1) / 500), text)


def timed_toy(layers: int = 2, breaks: bool = False) -> TimedToy:
    torch.manual_seed(0)
    return TimedToy(layers, breaks=breaks).eval()


def conditioning(seed: int = 1, batch: int = 1) -> dict[str, Tensor]:
    given = toy_inputs()
    torch.manual_seed(seed)
    video = torch.randn(batch, *given["hidden_states"].shape[1:])
    return {"hidden_states": video, "text": torch.randn(batch, *given["text"].shape[1:])}


def call(model: nn.Module, inputs: dict[str, Tensor], level: float) -> Tensor:
    with torch.no_grad():
        timestep = torch.full((inputs["text"].shape[0],), level)
        return model(**inputs, timestep=timestep).clone()


def sample(model: nn.Module, inputs: dict[str, Tensor], levels: Any = LEVELS) -> list[Tensor]:
    return [call(model, inputs, level) for level in levels]


@contextmanager
def reused_attention(
    model: nn.Module, rules: dict[str, Rule], modes: dict[str, str], residuals: dict[str, Tensor]
) -> Iterator[None]:
    """Run ``model`` eagerly; ``modes`` says per site what its attention does. No compiler."""
    running: list[str] = []
    layout = TokenLayout(GRID)
    biases = {
        name: rule.mask(GRID.frames).expand(layout)
        for name, rule in rules.items()
        if not rule.keeps_nothing
    }
    attend = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not running or k.shape[2] != layout.seq_len:
            return attend(q, k, v)
        site = running[-1]
        sparse = torch.zeros_like(q)
        if site in biases:
            sparse = attend(q, k, v, biases[site].to(q.dtype))
        if modes[site] == "refresh":
            residuals[site] = attend(q, k, v) - sparse
        if modes[site] in ("refresh", "dense"):
            return attend(q, k, v)
        return sparse + residuals[site] if modes[site] == "reuse" else sparse

    handles = []
    for name in rules:
        module = model.get_submodule(name)
        enter = lambda _module, _args, site=name: running.append(site)  # noqa: E731
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(lambda *_: (running.pop(), None)[1]))
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            yield
    finally:
        for handle in handles:
            handle.remove()


def expected(
    model: nn.Module, rules: dict[str, Rule], inputs: dict[str, Tensor], modes: str,
    reusing: tuple[str, ...], levels: Any = LEVELS, damping: Any = None,
) -> list[Tensor]:  # fmt: skip
    names = {"f": "refresh", "u": "reuse", "d": "dense"}
    residuals: dict[str, Tensor] = {}
    refreshes: list[tuple[float, dict[str, Tensor]]] = []
    outputs = []
    for letter, level in zip(modes, levels, strict=True):
        mode = names[letter]
        others = "dense" if mode == "dense" else "sparse"
        by_site = {site: mode if site in reusing else others for site in rules}
        if mode == "reuse" and damping is not None and len(refreshes) > 1:
            (before, first), (since, second) = refreshes[-2:]
            ahead = damping(level) * (since - level) / (before - since)
            for site in second:
                residuals[site] = second[site] + ahead * (second[site] - first[site])
        with reused_attention(model, rules, by_site, residuals):
            outputs.append(call(model, inputs, level))
        if mode == "refresh":
            refreshes.append((level, dict(residuals)))
    return outputs


def error(actual: list[Tensor], right: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(actual, right, strict=True))


def reusing_plan(model: nn.Module, refresh_at: Any = (900.0, 650.0, 250.0), **more: Any) -> Plan:
    return with_reuse(make_plan(model, toy_rules(2)), refresh_at, **more)
