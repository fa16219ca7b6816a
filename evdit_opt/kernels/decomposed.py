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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evdit_opt.kernels.decomposition import Decomposition, Run, decompose
from evdit_opt.kernels.dense import attend, lse_dtype

__all__ = ["Geometry", "Schedule", "choose_schedule", "forward", "key_bias", "own_windows"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Where frames and text lie in a sequence, in tokens.

    Attributes:
        frames: latent frames.
        tokens: tokens of one frame.
        prefix: text tokens before the video.
        suffix: text tokens after the video.
    """

    frames: int
    tokens: int
    prefix: int
    suffix: int

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence."""
        return self.prefix + self.frames * self.tokens + self.suffix

    @property
    def text(self) -> list[tuple[int, int]]:
        """Token ranges of the text."""
        video_stop = self.prefix + self.frames * self.tokens
        return join([(0, self.prefix), (video_stop, self.seq_len)])

    def token(self, frame: int) -> int:
        """Position of the first token of ``frame``."""
        return self.prefix + frame * self.tokens

    def ranges(
        self, frames: Sequence[tuple[int, int]], with_text: bool = False
    ) -> list[tuple[int, int]]:
        """Frame intervals, and the text where asked for, as ascending token ranges."""
        video = [(self.token(start), self.token(stop)) for start, stop in frames]
        return join(sorted(video + self.text) if with_text else video)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How the sparse rows are computed.

    Attributes:
        merge: merge shared and own keys by log-sum-exp, instead of gathering them.
        rows_per_call: rows of a run that share one gathered call.
    """

    merge: bool
    rows_per_call: int


def choose_schedule(plan: Decomposition, q: Tensor, tokens: int) -> Schedule:
    """The form that measured fastest for this device and shape (docs/notes/kernels.md)."""
    if q.device.type != "cpu":
        # A bias would rule out flash attention, so weights go into the merge there.
        return Schedule(merge=plan.is_weighted, rows_per_call=1)
    small = tokens < 192
    return Schedule(merge=small and plan.shared_frames > 1, rows_per_call=5 if small else 1)


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
    schedule = schedule or choose_schedule(plan, q, geometry.tokens)
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


def key_bias(attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A key-padding mask as additive numbers ``[batch | 1, heads | 1, 1, seq]``."""
    if attn_mask is None:
        return None
    if attn_mask.dtype != torch.bool:
        return attn_mask.to(lse_dtype(q.dtype))
    bias = torch.zeros(attn_mask.shape, dtype=lse_dtype(q.dtype), device=q.device)
    return bias.masked_fill_(~attn_mask, -math.inf)


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
    out, lse = attend(_take(call.q, ranges), call.k, call.v, call.bias, call.scale)
    offset = 0
    for start, stop in ranges:
        rows = slice(offset, offset + stop - start)
        call.out[:, :, start:stop] = out[:, :, rows]
        call.lse[:, :, start:stop] = lse[:, :, rows]
        offset += stop - start


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
    """Sparse rows: own keys first, then every group of shared keys merged in by log-sum-exp."""
    if not plan.runs:
        return
    geometry = call.geometry
    own = tuple(run for run in plan.runs if run.own)
    if own:
        _attend_runs(call, plan, None, own, max(run.count for run in own))
    groups = [(geometry.ranges(group.keys), group.weights) for group in plan.shared]
    if geometry.text:
        plain = [n for n, (_, weights) in enumerate(groups) if not any(weights)]
        text = geometry.text
        if plain:
            ranges, weights = groups[plain[0]]
            groups[plain[0]] = (ranges + text, weights)
        else:
            groups.append((text, (0.0,) * plan.sparse_rows))
    started = set(own)
    for ranges, weights in groups:
        k, v = _take(call.k, ranges), _take(call.v, ranges)
        bias = None
        if call.bias is not None:
            bias = _take(call.bias.transpose(2, 3), ranges).transpose(2, 3)
        for span in plan.spans:
            last = span[-1]
            start, stop = geometry.token(span[0].first), geometry.token(last.first + last.count)
            out, lse = attend(call.q[:, :, start:stop], k, v, bias, call.scale)
            span_weights = weights[span[0].position : last.position + last.count]
            if any(span_weights):
                shift = lse.new_tensor(span_weights).repeat_interleave(geometry.tokens)
                lse = lse + shift
            for run in span:
                rows = slice(geometry.token(run.first), geometry.token(run.first + run.count))
                part = slice(rows.start - start, rows.stop - start)
                into = call.out[:, :, rows], call.lse[:, :, rows]
                if run in started:
                    _merge_into(*into, out[:, :, part], lse[:, :, part], call.bias is not None)
                else:
                    into[0].copy_(out[:, :, part])
                    into[1].copy_(lse[:, :, part])
        started = set(plan.runs)


def _merge_into(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, may_be_empty: bool
) -> None:
    """Merge the attention over further keys, ``part``, into ``out`` and ``lse``."""
    difference = part_lse - lse
    if may_be_empty:
        # -inf - -inf: no key seen on either side.
        difference = torch.nan_to_num(difference, nan=0.0, posinf=math.inf, neginf=-math.inf)
    share = torch.sigmoid(difference).unsqueeze(-1)
    if out.dtype == share.dtype:
        out.lerp_(part, share)
    else:
        out.copy_(torch.lerp(out.to(share.dtype), part.to(share.dtype), share))
    torch.logaddexp(lse, part_lse, out=part_lse)
    lse.copy_(part_lse)


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
    keys = _KeyBuffer(call.k, shared, rows, capacity)
    values = _KeyBuffer(call.v, shared, rows, capacity)
    padding = None
    if call.bias is not None:
        padding = _KeyBuffer(call.bias.transpose(2, 3), shared, rows, capacity)
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


class _KeyBuffer:
    """Keys of a few rows at a time, ``[rows | batch, heads, shared + own, head_dim]``.

    The shared keys are copied when it is made; the own keys of a row when it is asked for.
    """

    def __init__(
        self, source: Tensor, shared: list[tuple[int, int]], rows: int, capacity: int
    ) -> None:
        self.source = source
        self.shared = sum(stop - start for start, stop in shared)
        self.buffer: Tensor | None = None
        self.shape = (max(rows, source.shape[0]), source.shape[1])
        self.length = self.shared + capacity
        if shared:
            buffer = self._allocate()
            offset = 0
            for start, stop in shared:
                buffer[:, :, offset : offset + stop - start] = source[:, :, start:stop]
                offset += stop - start

    def rows(self, geometry: "Geometry", run: Run, first: int, count: int) -> Tensor:
        """Keys of rows ``first .. first + count`` of ``run``; valid until the next call."""
        if not self.shared and len(run.own) == 1:
            start, stop, _ = run.own[0]
            return own_windows(self.source, geometry, first, count, start, stop)
        buffer = self._allocate() if self.buffer is None else self.buffer
        used = buffer[:count] if count > 1 or self.source.shape[0] == 1 else buffer
        offset = self.shared
        for start, stop, _ in run.own:
            length = (stop - start) * geometry.tokens
            used[:, :, offset : offset + length] = own_windows(
                self.source, geometry, first, count, start, stop
            )
            offset += length
        return used[:, :, :offset]

    def _allocate(self) -> Tensor:
        self.buffer = self.source.new_empty((*self.shape, self.length, self.source.shape[3]))
        return self.buffer


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


def own_windows(
    x: Tensor, geometry: Geometry, first: int, count: int, start: int, stop: int
) -> Tensor:
    """Frames ``row + start .. row + stop`` for each of ``count`` rows from ``first``, as a view.

    Args:
        x: ``[batch, heads, seq, dim]``; batch must be 1 if count is not.

    Returns:
        ``[count | batch, heads, (stop - start) * tokens, dim]``; windows of several rows overlap.
    """
    begin, end = geometry.token(first + start), geometry.token(first + count - 1 + stop)
    if count == 1:
        return x[:, :, begin:end]
    length = (stop - start) * geometry.tokens
    windows = x[0, :, begin:end].unfold(1, length, geometry.tokens)  # [heads, count, dim, length]
    return windows.permute(1, 0, 3, 2)


def join(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending token ranges without the empty ones, touching ones joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _take(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """Token ranges of ``x`` ``[batch, heads, seq, dim]`` side by side; a view if there is one."""
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
