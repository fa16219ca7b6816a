"""Tile attention in operators that every consumer of graphs knows.

Query frames that keep the same key frames with the same weights are one ordinary attention: their
queries against those keys, gathered, and a weight as a number added to the logits. So the FLOPs are
those of the kept tiles, the gathered keys of one such attention are held at a time, and nothing is
left to convert but slices, concatenations and ``scaled_dot_product_attention``.
Mask family: Efficient-vDiT, arXiv 2502.06155.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import getitem, itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.masks import DROPPED, TileMask
from evdit_opt.passes.graph import subgraphs

__all__ = ["attend_in_blocks", "use_standard_ops"]

Run = tuple[int, int]
Kept = tuple[tuple[int, float], ...]


def use_standard_ops(gm: fx.GraphModule) -> int:
    """Replace the operator by calls that trace to standard ones.

        before:  both = evdit.tile_attention(q, k, v, None, intervals, log_weights, 17, 100, ...)
                 out = both[0]
        after:   out = attend_in_blocks(q, k, v, None, intervals, log_weights, 17, 100, ...)

    Args:
        gm: a graph whose sites are rewritten; edited in place, subgraphs included. Whoever compiles
            or exports it next traces through the function.

    Returns:
        Number of calls replaced.

    Raises:
        UnsupportedInputError: if a log-sum-exp is read, which these operators do not return.
    """
    import evdit_opt.kernels.ops  # noqa: F401  (registers the operator)

    replaced = 0
    for body in subgraphs(gm):
        for node in body.graph.find_nodes(
            op="call_function", target=torch.ops.evdit.tile_attention.default
        ):
            for part in list(node.users):
                if part.target is not getitem or part.args[1] != 0:
                    raise UnsupportedInputError(
                        "expected a graph that reads the output of evdit.tile_attention only, "
                        f"{part.format_node()} reads its log-sum-exp; keep the operator"
                    )
                part.replace_all_uses_with(node)
                body.graph.erase_node(part)
            node.target = attend_in_blocks
            replaced += 1
        body.recompile()
    return replaced


def attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: list[int],
    log_weights: list[float],
    frames: int,
    tokens_per_frame: int,
    prefix: int,
    suffix: int,
    scale: float | None,
    impl: str,
) -> Tensor:
    """The output of ``torch.ops.evdit.tile_attention``, without its log-sum-exp.

    In half precision, weights are rounded to the dtype of q: that is what an attention takes.

    Args and shapes: as of the operator; ``impl`` does not matter here.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    sequence = _Sequence(frames, tokens_per_frame, prefix, q.shape[2])
    parts = list(range(0 if _is_zero(prefix) else -1, frames + (0 if _is_zero(suffix) else 1)))
    mask = TileMask.from_segments(frames, intervals, log_weights)
    alike: dict[Kept, list[int]] = {}
    for part in parts:
        alike.setdefault(_kept(mask, part, parts), []).append(part)

    pieces: dict[int, Tensor] = {}
    for kept, queries in alike.items():
        keys = [part for part, _ in kept]
        bias, seen = _bias(q, attn_mask, kept, sequence)
        out = F.scaled_dot_product_attention(
            sequence.take(q, queries), sequence.take(k, keys), sequence.take(v, keys), bias,
            scale=scale,
        )  # fmt: skip
        if seen is not None:
            out = torch.where(seen, out, 0.0)
        runs = _runs(queries)
        lengths = [sequence.length(run) for run in runs]
        outs = out.split(lengths, dim=2) if len(runs) > 1 else (out,)
        pieces.update({run[0]: piece for run, piece in zip(runs, outs, strict=True)})
    return torch.cat([pieces[first] for first in sorted(pieces)], dim=2)


@dataclass(frozen=True)
class _Sequence:
    """Where parts lie: frame i is part i, the text before is part -1, the text after comes last."""

    frames: int
    tokens: int
    prefix: int
    seq_len: int

    def range(self, run: Run) -> tuple[int, int]:
        """Tokens of some consecutive parts, as a half-open interval."""
        first, last = run
        start = 0 if first < 0 else self.prefix + first * self.tokens
        stop = self.seq_len if last == self.frames else self.prefix + (last + 1) * self.tokens
        return start, stop

    def length(self, run: Run) -> int:
        """Number of tokens of some consecutive parts."""
        start, stop = self.range(run)
        return stop - start

    def take(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """Parts of ``x`` ``[batch, heads, seq, dim]`` side by side."""
        slices = [x[:, :, start:stop] for start, stop in map(self.range, _runs(parts))]
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=2)


def _is_zero(length: int | torch.SymInt) -> bool:
    """Whether there is no text; where only the run can tell, there may be some."""
    return isinstance(length, int) and length == 0


def _kept(mask: TileMask, query: int, parts: Sequence[int]) -> Kept:
    """The parts that the tokens of ``query`` see; text sees and is seen by everything."""
    frames = range(mask.frames)
    weights = [mask.rows[query][j] if query in frames and j in frames else 0.0 for j in parts]
    return tuple((j, w) for j, w in zip(parts, weights, strict=True) if w != DROPPED)


def _runs(parts: Sequence[int]) -> list[Run]:
    """Ascending parts as (first, last) of those that are neighbours."""
    runs: list[Run] = []
    for part in parts:
        if runs and runs[-1][1] == part - 1:
            runs[-1] = (runs[-1][0], part)
        else:
            runs.append((part, part))
    return runs


def _bias(
    q: Tensor, attn_mask: Tensor | None, kept: Kept, sequence: _Sequence
) -> tuple[Tensor | None, Tensor | None]:
    """What the logits of the kept keys are given, and whether any key is seen, if that is open."""
    weights = _weights(q, kept, sequence) if any(weight for _, weight in kept) else None
    if attn_mask is None:
        return weights, None
    keys = [part for part, _ in kept]
    mask = sequence.take(attn_mask.transpose(2, 3), keys).transpose(2, 3)
    if mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
        seen = (mask != DROPPED).any(-1, keepdim=True)  # [batch | 1, heads | 1, 1, 1]
        return mask if weights is None else mask + weights, seen
    seen = mask.any(-1, keepdim=True)
    return mask if weights is None else torch.where(mask, weights, DROPPED), seen


def _weights(q: Tensor, kept: Kept, sequence: _Sequence) -> Tensor:
    """The weight of every kept key, ``[1, 1, 1, keys]``."""
    parts = []
    for weight, same in groupby(kept, key=itemgetter(1)):
        keys = sum(sequence.length((part, part)) for part, _ in same)
        parts.append(q.new_full((1, 1, 1, keys), weight))
    return torch.cat(parts, dim=3)
