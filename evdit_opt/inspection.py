"""``evdit inspect``: every attention of a model, and what would become of it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from evdit_opt.calibrate.survey import Survey, survey_attention
from evdit_opt.models import as_denoiser, load_pipeline

__all__ = ["inspect_pipeline", "survey_table"]


def inspect_pipeline(name: str, prompt: str | None, pipe_kwargs: Mapping[str, Any]) -> Table:
    """Describe every attention of a pipeline's denoiser, from its first call.

    Args:
        name: "tinywan", a pipeline's folder, or its id on Hugging Face.
        prompt: any prompt.
        pipe_kwargs: num_frames, height, width, ... of the call.

    Raises:
        UnsupportedInputError: if there is no such pipeline.
        EvditError: as ``survey_attention``.
    """
    if name == "tinywan":
        from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan

        pipe: Any = load_tinywan()
        pipe_kwargs = {**TINYWAN_CALL, **pipe_kwargs}
    else:
        pipe = load_pipeline(name)
    denoiser = as_denoiser(pipe, [prompt or "a red circle moving left"], pipe_kwargs)
    return survey_table(type(denoiser.model).__name__, survey_attention(denoiser))


def survey_table(model: str, survey: Survey) -> Table:
    """A line per attention module: site or not, its tokens, and why."""
    grid = survey.grid
    table = Table(
        title=f"{model}: {len(survey.layouts)} sites, {grid.frames} latent frames x "
        f"{grid.height} x {grid.width} tokens",
        caption="prefix + video + suffix tokens; attentions that are no site stay as they are",
    )
    for column in ("attention", "site", "tokens", "heads", "why"):
        table.add_column(column, justify="right" if column == "heads" else "left")
    for attention in {found.name: found for found in survey.attentions}.values():
        layout = survey.layouts.get(attention.name)
        if layout is not None:
            tokens = f"{layout.prefix} + {grid.tokens} + {layout.suffix}"
            why = f"3D self-attention; layout confirmed by {survey.evidence[attention.name]}"
        else:
            tokens = f"{attention.q_len or '?'} x {attention.kv_len or '?'}"
            why = survey.refused[attention.name]
        heads = f"{attention.heads} x {attention.head_dim or '?'}"
        table.add_row(attention.name, "yes" if layout else "no", tokens, heads, why)
    return table
