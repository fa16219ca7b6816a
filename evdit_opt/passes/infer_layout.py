"""Where the video tokens lie in the sequence of every site: grid, text before, text after."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evdit_opt.errors import LayoutError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.passes.find_attention import Sites
from evdit_opt.passes.grid_source import GridSource
from evdit_opt.passes.observe_attention import observe
from evdit_opt.passes.video_input import VideoInput, bind_arguments, grid_sources, video_input

__all__ = ["InferredLayout", "infer_layout"]

Evidence = Literal["probe", "length"]

SKETCH = 4
"""Numbers kept per token: enough to see whether it changed, however large the model."""

MOVED = 1e-3
"""Share of the largest change that counts as one; muted models move one token, noise none."""


@dataclass(frozen=True)
class InferredLayout:
    """What :func:`infer_layout` found out.

    Attributes:
        grid: the video grid of the call.
        source: how to read it from any call.
        layouts: layout per site, in model order.
        refused: sites whose layout is not certain, with the reason; leave them dense.
        evidence: per site in ``layouts``, "probe" if moving one latent voxel moved the one token it
            should, "length" if only the sequence length agrees.
    """

    grid: VideoGrid
    source: GridSource
    layouts: Mapping[str, TokenLayout]
    refused: Mapping[str, str]
    evidence: Mapping[str, Evidence]


@dataclass(frozen=True)
class _Seen:
    """Of every site: its sequence length, and the tokens each bump moved (None: not probed)."""

    lengths: Mapping[str, int]
    moved: Mapping[str, Sequence[tuple[int, ...]]]


def infer_layout(
    model: nn.Module,
    sites: Sites,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    grid: VideoGrid | None = None,
) -> InferredLayout:
    """Establish the layout of every site for one call; never a guess.

    The grid is the caller's word, else what patch size and input shape (or num_frames, height and
    width) say. The probe then checks it: with all attention muted, so that tokens do not mix, one
    latent voxel is changed at four corners of the clip; the one token that moves at each site says
    where that patch lies in its sequence. A reading that the probe contradicts is refused;
    where it cannot tell, the likeliest reading counts if its length fits.

    Args:
        model: the denoiser, dense.
        sites: what ``find_attention`` found.
        args: positional arguments of a call.
        kwargs: keyword arguments of a call.
        grid: the grid of this call, if the caller knows it.

    Raises:
        LayoutError: if no reading of the grid fits; says what was tried.
    """
    arguments = bind_arguments(model, args, kwargs)
    video = video_input(model, args, kwargs)
    tried = []
    probed: list[InferredLayout] = []
    with _probing(model, sites, arguments, video) as look:
        for source in grid_sources(model, video, arguments, grid):
            found = source.read(arguments) if _fits(source, arguments) else None
            if found is None or (grid is not None and found != grid):
                tried.append(f"{found or 'no whole patches'} by {source}")
                continue
            result = _judge(look(source, found), sites.names, source, found)
            if "probe" in result.evidence.values():
                return result
            probed.append(result)
            reasons = dict.fromkeys(result.refused.values()) or ["only the length fits"]
            tried.append(f"{found} by {source}: {'; '.join(reasons)}")
    if probed and probed[0].layouts:
        return probed[0]
    raise LayoutError(
        f"expected the token grid of {type(model).__name__} to follow from its arguments"
        f"{'' if grid is None else f' and to be {grid}'}, no reading fits: "
        f"{' | '.join(tried) or 'there is no 5-D input and no num_frames, height, width'}; "
        "give Config.grid if the model takes tokens, else leave it dense"
    )


def _fits(source: GridSource, arguments: Mapping[str, Any]) -> bool:
    if source.kind == "arguments":
        return True
    shape = arguments[source.input].shape
    if source.kind == "given":
        return bool(shape[1] == math.prod(source.patch))
    return all(
        shape[dim] >= patch and shape[dim] % patch == 0
        for dim, patch in zip(source.dims, source.patch, strict=True)
    )


def _corners(grid: VideoGrid) -> tuple[tuple[int, int, int], ...]:
    """First token, last of its row, first of the last row and frame: they fix F, H, W and order."""
    return (
        (0, 0, 0),
        (0, 0, grid.width - 1),
        (0, grid.height - 1, 0),
        (grid.frames - 1, 0, 0),
    )


def _token(grid: VideoGrid, corner: tuple[int, int, int]) -> int:
    frame, row, column = corner
    return (frame * grid.height + row) * grid.width + column


@contextmanager
def _probing(
    model: nn.Module, sites: Sites, arguments: Mapping[str, Any], video: VideoInput
) -> Iterator[Callable[[GridSource, VideoGrid], _Seen]]:
    """Capture the model once, with all attention muted, to try several readings on it."""
    names = sites.names
    sketches: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, q: Tensor, *_: Any) -> None:
        sketches[name].append(_sketch(q))

    def run(tensor: Tensor) -> dict[str, Tensor]:
        for seen in sketches.values():
            seen.clear()
        model(**{**arguments, video.name: tensor})
        # Models that attend sample by sample call more than once; the first sample is enough.
        return {name: seen[0] for name, seen in sketches.items() if seen}

    def look(source: GridSource, grid: VideoGrid) -> _Seen:
        base = run(video.tensor)
        lengths = {name: int(sketch.shape[0]) for name, sketch in base.items()}
        if all(length < grid.tokens for length in lengths.values()):
            return _Seen(lengths, {})
        moved: dict[str, list[tuple[int, ...]]] = {name: [] for name in base}
        for bumped in _bumps(video.tensor, source, grid):
            for name, sketch in run(bumped).items():
                moved[name].append(_moved(base[name], sketch))
        return _Seen(lengths, moved)

    with torch.no_grad(), observe(model, names, keep, scoped=sites.scoped, mute=True):
        yield look


def _bumps(tensor: Tensor, source: GridSource, grid: VideoGrid) -> Iterator[Tensor]:
    step = float(tensor.float().std()) + 1.0
    for corner in _corners(grid):
        bumped = tensor.clone()
        if source.kind != "patch":
            bumped[:, _token(grid, corner)] += step
        else:
            index: list[Any] = [slice(None)] * tensor.ndim
            for dim, patch, position in zip(source.dims, source.patch, corner, strict=True):
                index[dim] = position * patch
            bumped[tuple(index)] += step
        yield bumped


def _sketch(q: Tensor) -> Tensor:
    """A few numbers per token, ``[seq, SKETCH]``; keeping q of every site could take all memory."""
    rows = q[0].transpose(0, 1).flatten(1).double()  # [seq, heads * head_dim]
    waves = torch.arange(rows.shape[1], device=q.device, dtype=torch.float64)[:, None]
    return rows @ torch.cos(waves * torch.arange(1, SKETCH + 1, device=q.device) + 0.5)


def _moved(before: Tensor, after: Tensor) -> tuple[int, ...]:
    if before.shape != after.shape:
        return ()
    change = (after - before).abs().amax(1)
    moved = (change > MOVED * change.max()).nonzero().flatten().tolist()
    return tuple(moved)


def _judge(
    seen: _Seen, names: Sequence[str], source: GridSource, grid: VideoGrid
) -> InferredLayout:
    layouts: dict[str, TokenLayout] = {}
    refused: dict[str, str] = {}
    evidence: dict[str, Evidence] = {}
    for name in names:
        if name not in seen.lengths:
            refused[name] = "its q, k and v are not made from the first input of its module"
            continue
        text = seen.lengths[name] - grid.tokens
        if text < 0:
            refused[name] = f"{seen.lengths[name]} tokens, a clip of {grid} has {grid.tokens}"
            continue
        verdict = _place(seen.moved.get(name, ()), text, grid)
        if isinstance(verdict, str):
            refused[name] = verdict
            continue
        prefix, evidence[name] = verdict
        layouts[name] = TokenLayout(grid, prefix, text - prefix)
    return InferredLayout(grid, source, layouts, refused, evidence)


def _place(
    moved: Sequence[tuple[int, ...]], text: int, grid: VideoGrid
) -> tuple[int, Evidence] | str:
    """Tokens before the video, and how that is known; or why it is not."""
    if not any(moved):
        return "moving the video moves none of its tokens, it is not attention over video"
    expected = [_token(grid, corner) for corner in _corners(grid)]
    offsets = {
        tuple(found - token for found in tokens)
        for tokens, token in zip(moved, expected, strict=True)
    }
    if len(offsets) == 1:
        # More than one: the sequence holds the video several times, and the first counts.
        starts = offsets.pop()
        apart = all(after - before >= grid.tokens for before, after in pairwise(starts))
        if apart and starts[0] >= 0 and starts[-1] <= text:
            return starts[0], "probe"
    if any(len(tokens) != 1 for tokens in moved):
        # Something besides attention mixes tokens (a convolution, a norm over the clip).
        if text == 0:
            return 0, "length"
        return f"{text} tokens besides the video, and the probe cannot tell where they lie"
    return (
        f"tokens {[tokens[0] for tokens in moved]} moved where a frame-major clip of {grid} "
        f"moves {expected} plus the text before it"
    )
