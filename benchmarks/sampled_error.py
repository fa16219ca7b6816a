"""How far attention over a long video is from float64, looked at in a few of its rows."""

import torch
from torch import Tensor

from evdit_opt.grid import TokenLayout
from evdit_opt.masks import TileMask

__all__ = ["sample_rows", "sampled_errors"]


def sample_rows(layout: TokenLayout, count: int) -> list[int]:
    """Tokens to look at: both ends of the sequence, of some frames, and others at random."""
    tokens, video = layout.grid.tokens_per_frame, layout.grid.tokens
    edges = {0, layout.seq_len - 1, layout.prefix, layout.prefix + video - 1}
    for frame in {0, 1, layout.grid.frames // 2, layout.grid.frames - 1}:
        first = layout.prefix + frame * tokens
        edges |= {first, first + tokens - 1}
    generator = torch.Generator().manual_seed(0)
    others = torch.randperm(layout.seq_len, generator=generator).tolist()
    rows = [*sorted(edges), *(token for token in others if token not in edges)]
    return sorted(rows[:count])


def _bias(mask: TileMask, layout: TokenLayout, rows: Tensor) -> Tensor:
    """Log-weights ``[rows, seq]`` of some rows of the token mask, float64."""
    frame = torch.full((layout.seq_len,), mask.frames)
    video = slice(layout.prefix, layout.prefix + layout.grid.tokens)
    frame[video] = torch.arange(layout.grid.tokens) // layout.grid.tokens_per_frame
    table = torch.zeros(mask.frames + 1, mask.frames + 1, dtype=torch.float64)
    table[:-1, :-1] = mask.bias
    return table[frame[rows]][:, frame]


def sampled_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TileMask,
    layout: TokenLayout,
    out: Tensor,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
    grad_out: Tensor | None = None,
    lse: Tensor | None = None,
    count: int = 32,
) -> dict[str, float]:
    """Largest absolute error of sampled rows against float64, one head at a time.

    Args:
        q: ``[1, heads, seq, head_dim]``, as many key heads; so are k and v.
        mask: the tile mask.
        layout: where frames and text lie.
        out: what is judged.
        grads: gradients of q, k, v to judge, too; needs ``grad_out`` and ``lse``. That of a key
            needs every query, so it is computed from ``out`` and ``lse``, which are judged already.
        grad_out: gradient of out.
        lse: log-sum-exp of every query.
        count: rows to look at.

    Returns:
        "out", and "grad_q", "grad_k", "grad_v" where asked for.
    """
    rows = torch.tensor(sample_rows(layout, count))
    bias = _bias(mask, layout, rows).to(q.device)
    symmetric = _bias(TileMask.from_bias(mask.bias.T), layout, rows).to(q.device)
    rows = rows.to(q.device)
    scale = q.shape[-1] ** -0.5
    worst: dict[str, float] = {}

    def judge(name: str, actual: Tensor, exact: Tensor) -> None:
        error = (actual[rows].double() - exact).abs().max().item()
        worst[name] = max(worst.get(name, 0.0), error)

    for head in range(q.shape[1]):
        own_q, own_k, own_v = (x[0, head].double() for x in (q, k, v))
        weights = torch.softmax(own_q[rows] @ own_k.T * scale + bias, -1)  # [rows, seq]
        exact = weights @ own_v
        judge("out", out[0, head], exact)
        if grads is None or grad_out is None or lse is None:
            continue
        own_grad = grad_out[0, head].double()
        delta = (own_grad * out[0, head].double()).sum(-1)  # [seq]
        exact_delta = (own_grad[rows] * exact).sum(-1, keepdim=True)
        inner = weights * (own_grad[rows] @ own_v.T - exact_delta) * scale
        judge("grad_q", grads[0][0, head], inner @ own_k)
        columns = (own_k[rows] @ own_q.T * scale + symmetric - lse[0, head].double()).exp()
        judge("grad_v", grads[2][0, head], columns @ own_grad)
        inner = columns * (own_v[rows] @ own_grad.T - delta) * scale
        judge("grad_k", grads[1][0, head], inner @ own_q)
    return worst
