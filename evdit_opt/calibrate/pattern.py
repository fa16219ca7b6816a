"""Does attention repeat: from tile to tile, prompt to prompt, step to step, branch to branch?

Efficient-vDiT (arXiv 2502.06155, section 3) observes that off-diagonal tiles are alike, and that
the keys which hold 90, 95 or 99% of a query's attention are about the same for other data. Both are
measured here on a few exact rows of the map (``rows.py``). Only sums are kept, and of some calls
the sets of keys, in two bits a key: memory is linear in the sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from evdit_opt.calibrate.kept import flat, part
from evdit_opt.calibrate.rows import attention_rows, sample_rows
from evdit_opt.grid import TokenLayout

__all__ = ["SHARES", "Pattern", "PatternRecord", "Relation"]

SHARES = (0.90, 0.95, 0.99)
"""Shares of a query's attention whose smallest sets of keys are compared."""

Relation = Literal["prompts", "timesteps", "branches"]
Place = tuple[int, int, int]  # step, guidance branch, place in the batch


@dataclass(frozen=True)
class Pattern:
    """What was found at one site, by head.

    Attributes:
        similarity: ``[heads]``: mean cosine between two different off-diagonal tiles, on the
            sampled rows; None where there are fewer than two.
        keys: ``[heads, shares]``: size of the sets over all keys.
        iou: ``[heads, shares]`` by what is compared, where there were two to compare: the
            intersection of two sets over their union.
        caught: like ``iou``: share of the later call's attention on the earlier call's set.
    """

    similarity: Tensor | None
    keys: Tensor
    iou: Mapping[Relation, Tensor]
    caught: Mapping[Relation, Tensor]


class _Mean:
    """A running mean of tensors."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor) -> None:
        self._sum = value if self._sum is None else self._sum + value
        self._count += 1

    @property
    def value(self) -> Tensor | None:
        return None if self._sum is None else self._sum / self._count

    def state(self) -> dict[str, Tensor]:
        count = torch.tensor(self._count)
        return {} if self._sum is None else {"sum": self._sum, "count": count}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._sum, self._count = state["sum"], int(state["count"])


class PatternRecord:
    """Running figures of one site over the calls of the dense model.

    Args:
        layout: of its tokens.
        seed: of the choice of rows.
    """

    def __init__(self, layout: TokenLayout, seed: int = 0) -> None:
        self.layout = layout
        self.sample = sample_rows(layout, torch.Generator().manual_seed(seed))
        self._similarity, self._keys = _Mean(), _Mean()
        self._overlap: dict[Relation, _Mean] = {name: _Mean() for name in get_args(Relation)}
        self._means: dict[str, _Mean] = {"similarity": self._similarity, "keys": self._keys}
        self._means |= {str(name): mean for name, mean in self._overlap.items()}
        self._first_run: dict[Place, Tensor] = {}
        self._run: dict[Place, Tensor] = {}

    def add(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        step: int = 0,
        branch: int = 0,
    ) -> None:
        """Measure one call.

        Args:
            q: ``[batch, heads, seq, head_dim]``; what shares a batch is compared as guidance
                branches are.
            k: ``[batch, kv_heads, seq, head_dim]``.
            attn_mask: the model's own key-padding mask, or None.
            scale: softmax scale, None for ``head_dim ** -0.5``.
            step: number of its step.
            branch: number of its guidance branch.
        """
        for entry in range(q.shape[0]):
            own = slice(entry, entry + 1)
            mask = attn_mask if attn_mask is None or len(attn_mask) == 1 else attn_mask[own]
            self._add(q[own], k[own], mask, scale, (step, branch, entry))

    def end_run(self) -> None:
        """A run is over. What comes next is compared with the first run, prompt with prompt."""
        self._first_run = self._first_run or self._run
        self._run = {}

    def state(self) -> dict[str, Tensor]:
        """All sums between two runs, to go on from with :meth:`load_state`."""
        return flat({name: mean.state() for name, mean in self._means.items()})

    def first_run(self) -> dict[str, Tensor]:
        """What runs are compared with; the same after every run, and larger than the sums."""
        return {"-".join(map(str, place)): own for place, own in self._first_run.items()}

    def load_state(self, state: Mapping[str, Tensor], first_run: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state` and :meth:`first_run`, in a record made alike."""
        for name, mean in self._means.items():
            mean.load_state(part(state, name))
        for place, own in first_run.items():
            step, branch, entry = map(int, place.split("-"))
            self._first_run[step, branch, entry] = own

    def pattern(self) -> Pattern:
        """The figures over all calls so far."""
        keys = self._keys.value
        assert keys is not None, "nothing was recorded"
        both = {name: mean.value for name, mean in self._overlap.items() if mean.value is not None}
        return Pattern(
            similarity=self._similarity.value,
            keys=keys,
            iou={name: value[..., 0] for name, value in both.items()},
            caught={name: value[..., 1] for name, value in both.items()},
        )

    def _add(
        self, q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None, place: Place
    ) -> None:
        earlier, head = self._earlier(place), 0
        alike: list[Tensor] = []
        keys, packed = [], []
        overlaps: list[list[Tensor]] = [[] for _ in earlier]
        for rows in attention_rows(q, k, self.layout, self.sample, mask, scale):
            (weights,) = rows.flatten(2, 3)  # [heads, rows, seq]
            levels = key_levels(weights)
            heads = slice(head, head + len(weights))
            head = heads.stop
            for (_, other), own in zip(earlier, overlaps, strict=True):
                others = unpack(other[heads].to(levels.device), levels.shape[-1])
                own.append(overlap(weights, levels, others).cpu())
            found = tile_similarity(rows[0], self.layout, self.sample.frames)
            alike += [] if found is None else [found.cpu()]
            keys.append(torch.stack([x.double().mean((1, 2)) for x in sets(levels)], -1).cpu())
            packed.append(pack(levels).cpu())
        self._keys.add(torch.cat(keys))
        if alike:
            self._similarity.add(torch.cat(alike))
        for (relation, _), own in zip(earlier, overlaps, strict=True):
            self._overlap[relation].add(torch.cat(own))
        self._run[place] = torch.cat(packed)

    def _earlier(self, place: Place) -> list[tuple[Relation, Tensor]]:
        """The sets of keys that a call is compared with."""
        step, *branch = place
        found: list[tuple[Relation, Tensor]] = []
        for (other_step, *other_branch), own in self._run.items():
            if other_branch == branch and other_step != step:
                found.append(("timesteps", own))
            elif other_step == step and other_branch != branch:
                found.append(("branches", own))
        if place in self._first_run:
            found.append(("prompts", self._first_run[place]))
        return found


def key_levels(weights: Tensor) -> Tensor:
    """To which sets every key belongs.

    Args:
        weights: ``[..., seq]``, shares of a query's attention.

    Returns:
        uint8 like ``weights``: n for keys that the smallest set of ``SHARES[n]`` is the first to
        hold, ``len(SHARES)`` for those in none. The sets are nested.
    """
    ordered, keys = weights.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # what all larger keys hold
    levels = torch.zeros_like(ordered, dtype=torch.uint8)
    for share in SHARES:
        levels += before >= share
    return torch.zeros_like(levels).scatter_(-1, keys, levels)


def sets(levels: Tensor) -> list[Tensor]:
    """The sets of keys by share, as bools."""
    return [levels <= n for n in range(len(SHARES))]


def overlap(weights: Tensor, levels: Tensor, others: Tensor) -> Tensor:
    """How one call's sets meet those of another call at the same queries.

    Args:
        weights: ``[heads, rows, seq]``, of the one call.
        levels: like ``weights``, its :func:`key_levels`.
        others: like ``levels``, of the other call.

    Returns:
        ``[heads, shares, 2]``, float64, mean over rows: intersection over union, and the share of
        ``weights`` on the other call's set.
    """
    found = []
    for own, other in zip(sets(levels), sets(others), strict=True):
        iou = (own & other).sum(-1) / (own | other).sum(-1)
        caught = (weights * other).sum(-1)
        found.append(torch.stack([iou.double().mean(-1), caught.double().mean(-1)], -1))
    return torch.stack(found, 1)


def tile_similarity(rows: Tensor, layout: TokenLayout, frames: Tensor) -> Tensor | None:
    """Mean cosine between different off-diagonal tiles.

    Without comparing them pair by pair: of n unit vectors u, the mean over pairs of different ones
    is ``(|sum u|^2 - n) / (n (n - 1))``.

    Args:
        rows: ``[heads, frames, positions, seq]``, exact rows of the map.
        layout: of the sequence.
        frames: ``[frames]``, the query frames.

    Returns:
        ``[heads]``, float64; None where there are fewer than two such tiles.
    """
    grid = layout.grid
    count = len(frames) * (grid.frames - 1)
    if count < 2:
        return None
    tiles = rows[..., layout.prefix : layout.prefix + grid.tokens].unflatten(-1, (grid.frames, -1))
    tiles = tiles.movedim(-2, 2).flatten(3)  # [heads, query frames, key frames, positions * tokens]
    norms = tiles.norm(dim=-1).clamp_min(torch.finfo(tiles.dtype).tiny)
    weights = 1 / norms
    weights[:, torch.arange(len(frames)), frames] = 0.0  # the own frame's tile is on the diagonal
    total = torch.einsum("hij,hijt->ht", weights, tiles)
    return (total.double().square().sum(-1) - count) / (count * (count - 1))


def pack(levels: Tensor) -> Tensor:
    """Four levels a byte, along the last dimension."""
    padded = torch.nn.functional.pad(levels, (0, -levels.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return padded[..., 0] | padded[..., 1] << 2 | padded[..., 2] << 4 | padded[..., 3] << 6


def unpack(packed: Tensor, length: int) -> Tensor:
    """Inverse of :func:`pack`."""
    parts = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    return parts.flatten(-2)[..., :length]
