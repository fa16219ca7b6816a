"""An inspection as tables and sentences, for people."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from evdit_opt.inspection.examine import Inspection, SeenAttention

__all__ = ["show"]


def show(inspection: Inspection) -> Group:
    """Everything ``inspection`` holds, to print."""
    return Group(*_parts(inspection))


def _parts(inspection: Inspection) -> Iterator[RenderableType]:
    yield _attentions(inspection)
    if inspection.fullgraph:
        yield Text("Dynamo traces the model as one graph.")
    else:
        yield _breaks(inspection)
    yield Text(_speed(inspection))


def _attentions(inspection: Inspection) -> Table:
    grid = inspection.grid
    tokens = f", {grid.frames} latent frames x {grid.height} x {grid.width} tokens" if grid else ""
    table = Table(
        title=f"{inspection.model}: {len(inspection.sites)} sites{tokens}",
        caption="prefix + video + suffix tokens; attentions that are no site stay as they are",
    )
    for column in ("attention", "site", "tokens", "heads", "why"):
        table.add_column(column, justify="right" if column == "heads" else "left", overflow="fold")
    for seen in inspection.attentions:
        heads = f"{seen.heads} x {seen.head_dim or '?'}"
        why = f"{seen.reason}; reached in a scope" if seen.way == "scope" else seen.reason
        row = (seen.name, "yes" if seen.site else "no", _tokens(seen, inspection), heads, why)
        table.add_row(*(escape(cell) for cell in row))
    return table


def _tokens(seen: SeenAttention, inspection: Inspection) -> str:
    if seen.site and inspection.grid is not None:
        return f"{seen.prefix} + {inspection.grid.tokens} + {seen.suffix}"
    return f"{seen.q_tokens or '?'} x {seen.kv_tokens or '?'}"


def _breaks(inspection: Inspection) -> Text:
    lines = [f"Dynamo traces the model in {inspection.graphs} graphs. It breaks at"]
    for found in inspection.graph_breaks:
        lines += [f"  {found.file}:{found.line}", f"      {found.code}", f"    {found.reason}"]
        if found.whole_function:
            lines.append("    The whole function around this line is left untraced.")
    return Text("\n".join(lines), overflow="fold")


def _speed(inspection: Inspection) -> str:
    if not inspection.sites:
        return "No attention here can be made sparse, so no speedup is possible."
    found = inspection.attention
    if found is None:
        return "The share of attention in the step was not measured."
    return (
        f"Attention of the sites takes {found.share:.0%} of a denoiser call "
        f"({found.dense_ms:.1f} ms, {found.without_ms:.1f} ms without it), so no mask can make the "
        f"call more than {found.max_speedup:.2f}x faster ({found.method}; {found.rounds} rounds, "
        f"{found.device}, {found.dtype}, {found.threads} CPU threads)."
    )
