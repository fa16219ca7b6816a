"""Tile attention as a few dense attention calls: exact, and no kernel of our own.

Dense rows and text queries are one call against the whole sequence. The sparse rows have two forms:

* gather: copy the kept keys of a row (shared first, own last) side by side and attend once. The
  shared keys are copied once per call; rows of one run may share a call as its batch.
* merge: one call of all sparse queries with the shared keys, one batched call of every frame with
  its own keys (views, no copies), put together by log-sum-exp. A weight is a shift of that number.

FLOPs are those of the kept tiles. Memory is linear in the sequence; nothing is seq x seq.
Mask family: Efficient-vDiT, arXiv 2502.06155.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evdit_opt.kernels.decomposition import Decomposition, Run, decompose
from evdit_opt.kernels.dense import attend, key_bias, lse_dtype
from evdit_opt.kernels.geometry import Geometry, own_windows, take
from evdit_opt.kernels.key_buffer import KeyBuffer

__all__ = ["Schedule", "choose_schedule", "forward"]

# Below this many tokens a frame, one row is too little work for a call of its own.
SMALL_FRAME = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How the sparse rows are computed.

    Attributes:
        merge: merge shared and own keys by log-sum-exp, instead of gathering them.
        rows_per_call: rows of a run that share one gathered call.
    """

    merge: bool
    rows_per_call: int


def choose_schedule(plan: Decomposition, geometry: Geometry) -> Schedule:
    """The form that measured fastest (docs/notes/kernels.md)."""
    if plan.is_weighted:
        # Gathering would need a bias: slower on a CPU, and it rules out flash attention on CUDA.
        return Schedule(merge=True, rows_per_call=1)
    if plan.shared_frames == 0 and not geometry.text:
        # Own keys only are views: nothing to copy, so as few calls as possible.
        return Schedule(merge=False, rows_per_call=plan.frames)
    return Schedule(merge=False, rows_per_call=1 if geometry.tokens >= SMALL_FRAME else 5)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
    schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor]:
    """Tile attention.

    Args:
        q: ``[batch, heads, seq, head_dim]``, any strides.
        k: ``[batch, kv_heads, seq, head_dim]``, any strides; heads is a multiple of kv_heads.
        v: like k.
        attn_mask: None or a key-padding mask ``[batch | 1, heads | 1, 1, seq]``, bool or float.
        intervals: ``TileMask.segments()[0]``.
        log_weights: ``TileMask.segments()[1]``.
        geometry: frames and text of the sequence.
        scale: multiplies the logits.
        schedule: how the sparse rows are computed; None chooses.

    Returns:
        out like ``torch.empty_like(q)``, lse ``[batch, heads, seq]`` (natural log, float32 or 64).
    """
    plan = decompose(intervals, log_weights, geometry.frames)
    schedule = schedule or choose_schedule(plan, geometry)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bias = key_bias(attn_mask, q)
    groups = q.shape[1] // k.shape[1]
    for group in range(groups):
        # Query head h reads key head h // groups: a strided slice of the query heads, no copies.
        heads = slice(group, None, groups)
        own_bias = bias[:, heads] if bias is not None and bias.shape[1] > 1 else bias
        call = _Call(q[:, heads], k, v, own_bias, out[:, heads], lse[:, heads], geometry, scale)
        _dense_rows(call, plan)
        one_by_one = q.shape[0] > 1 and (schedule.merge or schedule.rows_per_call > 1)
        for part in call.split() if one_by_one else [call]:
            (_merge if schedule.merge else _gather)(part, plan, schedule)
    return out, lse


@dataclass(frozen=True, slots=True)
class _Call:
    """Tensors of one call with as many query heads as key heads; out and lse are written to."""

    q: Tensor  # [batch, heads, seq, head_dim]
    k: Tensor
    v: Tensor
    bias: Tensor | None  # [batch | 1, heads | 1, 1, seq]
    out: Tensor
    lse: Tensor  # [batch, heads, seq]
    geometry: Geometry
    scale: float

    def split(self) -> list["_Call"]:
        """One call per batch element."""
        calls = []
        for b in range(self.q.shape[0]):
            one = slice(b, b + 1)
            bias = self.bias[one] if self.bias is not None and self.bias.shape[0] > 1 else self.bias
            calls.append(
                _Call(
                    self.q[one], self.k[one], self.v[one], bias, self.out[one], self.lse[one],
                    self.geometry, self.scale,
                )
            )  # fmt: skip
        return calls


def _dense_rows(call: _Call, plan: Decomposition) -> None:
    """Queries that see the whole sequence: frames kept in full, and text."""
    ranges = call.geometry.ranges(plan.dense, with_text=True)
    if not ranges:
        return
    out, lse = attend(take(call.q, ranges), call.k, call.v, call.bias, call.scale)
    _put(call.out, ranges, out)
    _put(call.lse, ranges, lse)


def _gather(call: _Call, plan: Decomposition, schedule: Schedule) -> None:
    """Sparse rows: shared and own keys side by side, one call per ``rows_per_call`` rows."""
    if not plan.runs:
        return
    geometry = call.geometry
    shared = geometry.text
    for group in plan.shared:
        shared += geometry.ranges(group.keys)
    _attend_runs(call, plan, shared, plan.runs, schedule.rows_per_call)


def _merge(call: _Call, plan: Decomposition, schedule: Schedule) -> None:
    """Sparse rows: own keys first, then every group of shared keys merged in by log-sum-exp.

    The sparse rows are copied next to one another, so that each group is one attention call and one
    merge, however many dense rows lie between them.
    """
    if not plan.runs:
        return
    geometry = call.geometry
    own = tuple(run for run in plan.runs if run.own)
    if own:
        _attend_runs(call, plan, None, own, max(run.count for run in own))
    for run in plan.runs:
        if not run.own:
            rows = slice(geometry.token(run.first), geometry.token(run.first + run.count))
            call.out[:, :, rows] = 0.0
            call.lse[:, :, rows] = -math.inf
    may_be_empty = call.bias is not None or len(own) < len(plan.runs)

    sparse = geometry.ranges([(run.first, run.first + run.count) for run in plan.runs])
    q, out, lse = (take(x, sparse) for x in (call.q, call.out, call.lse.unsqueeze(-1)))
    lse = lse.squeeze(-1)
    for ranges, weights in _shared_groups(plan, geometry):
        k, v = take(call.k, ranges), take(call.v, ranges)
        bias = None
        if call.bias is not None:
            bias = take(call.bias.transpose(2, 3), ranges).transpose(2, 3)
        part, part_lse = attend(q, k, v, bias, call.scale)
        if any(weights):
            per_row = part_lse.unflatten(2, (len(weights), geometry.tokens))
            part_lse = (per_row + per_row.new_tensor(weights)[:, None]).flatten(2)
        _merge_into(out, lse, part, part_lse, may_be_empty)
    if len(sparse) > 1:  # otherwise out and lse are views, written already
        _put(call.out, sparse, out)
        _put(call.lse, sparse, lse)


def _shared_groups(
    plan: Decomposition, geometry: Geometry
) -> list[tuple[list[tuple[int, int]], tuple[float, ...]]]:
    """Token ranges and log-weight per sparse row of every group of shared keys, text included."""
    groups = [(geometry.ranges(group.keys), group.weights) for group in plan.shared]
    if geometry.text:
        plain = next((n for n, (_, weights) in enumerate(groups) if not any(weights)), None)
        if plain is None:
            groups.append((geometry.text, (0.0,) * plan.sparse_rows))
        else:
            groups[plain] = (groups[plain][0] + geometry.text, groups[plain][1])
    return groups


def _put(into: Tensor, ranges: list[tuple[int, int]], rows: Tensor) -> None:
    """Write rows that lie next to one another back to their token ranges."""
    offset = 0
    for start, stop in ranges:
        into[:, :, start:stop] = rows[:, :, offset : offset + stop - start]
        offset += stop - start


def _merge_into(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, may_be_empty: bool
) -> None:
    """Merge the attention over further keys, ``part``, into ``out`` and ``lse``."""
    difference = part_lse - lse
    if may_be_empty:
        # -inf - -inf: no key seen on either side.
        difference = torch.nan_to_num(difference, nan=0.0, posinf=math.inf, neginf=-math.inf)
        lse.copy_(torch.logaddexp(lse, part_lse))
    else:
        # The same number as logaddexp, which is 20 times slower on a CPU.
        lse += torch.nn.functional.softplus(difference, threshold=40.0)
    share = torch.sigmoid(difference).unsqueeze(-1)
    # Three vectorised passes; lerp with a broadcast weight is scalar on a CPU.
    out += (part.to(share.dtype) - out).mul_(share).to(out.dtype)


def _attend_runs(
    call: _Call,
    plan: Decomposition,
    shared: list[tuple[int, int]] | None,
    runs: tuple[Run, ...],
    rows_per_call: int,
) -> None:
    """Attend from every row of ``runs`` to the shared token ranges (None: without) and its own."""
    geometry, with_shared = call.geometry, shared is not None
    shared = shared or []
    capacity = max(run.own_frames for run in runs) * geometry.tokens
    rows = min(rows_per_call, max(run.count for run in runs))
    keys = KeyBuffer(call.k, shared, rows, capacity)
    values = KeyBuffer(call.v, shared, rows, capacity)
    padding = None
    if call.bias is not None:
        padding = KeyBuffer(call.bias.transpose(2, 3), shared, rows, capacity)
    for run in runs:
        weights = _run_weights(plan, run, geometry, with_shared, call.lse)
        for first in range(run.first, run.first + run.count, rows):
            count = min(rows, run.first + run.count - first)
            bias = None
            if weights is not None:
                offset = first - run.first
                bias = weights if weights.shape[0] == 1 else weights[offset : offset + count]
            if padding is not None:
                hidden = padding.rows(geometry, run, first, count).transpose(2, 3)
                bias = hidden if bias is None else hidden + bias
            out, lse = attend(
                own_windows(call.q, geometry, first, count, 0, 1),
                keys.rows(geometry, run, first, count),
                values.rows(geometry, run, first, count),
                bias,
                call.scale,
            )
            own_windows(call.out, geometry, first, count, 0, 1).copy_(out)
            lse_rows = own_windows(call.lse.unsqueeze(-1), geometry, first, count, 0, 1)
            lse_rows.copy_(lse.unsqueeze(-1))


def _run_weights(
    plan: Decomposition, run: Run, geometry: Geometry, with_shared: bool, like: Tensor
) -> Tensor | None:
    """Log-weights of a run's keys, ``[rows | 1, 1, 1, keys]``; None if all are 0."""
    own = [weight for start, stop, weight in run.own for _ in range(start, stop)]
    groups = plan.shared if with_shared else ()
    table = [
        [group.weights[row] for group in groups for _ in range(group.frames)] + own
        for row in range(run.position, run.position + run.count)
    ]
    if not any(map(any, table)):
        return None
    if all(row == table[0] for row in table):
        table = table[:1]
    text = sum(stop - start for start, stop in geometry.text) if with_shared else 0
    video = like.new_tensor(table).repeat_interleave(geometry.tokens, dim=1)
    return torch.cat([video.new_zeros(len(table), text), video], dim=1)[:, None, None]
