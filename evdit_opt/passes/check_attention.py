"""What an attention must be like for the sparse operator to compute it."""

from evdit_opt.passes.graph import Attention, value_of

__all__ = ["mask_kind", "unsupported"]


def unsupported(attention: Attention) -> str:
    """Why the operator cannot compute this attention; empty if it can."""
    q, v = value_of(attention.q), value_of(attention.v)
    if attention.is_causal:
        return "causal attention"
    if attention.dropout_p:
        return f"attention with dropout {attention.dropout_p}"
    if q.ndim != 4:
        return f"q with {q.ndim} dimensions instead of [batch, heads, seq, head_dim]"
    if v.shape[3] != q.shape[3]:
        return f"head_dim {v.shape[3]} for v and {q.shape[3]} for q"
    if mask_kind(attention) == "other":
        return (
            f"an attention mask of shape {tuple(value_of(attention.attn_mask).shape)}, which may "
            "hide different keys from different queries (only [batch, heads, 1, seq] is kept)"
        )
    return ""


def mask_kind(attention: Attention) -> str:
    """ "none", "key padding" (the same keys hidden from every query) or "other"."""
    if attention.attn_mask is None:
        return "none"
    mask = value_of(attention.attn_mask)
    return "key padding" if mask.ndim == 4 and mask.shape[2] == 1 else "other"
