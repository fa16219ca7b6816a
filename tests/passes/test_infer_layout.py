"""The probe on toy models: what it proves, what it refuses, where it abstains."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evdit_opt.errors import LayoutError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.passes.find_attention import find_attention
from evdit_opt.passes.infer_layout import InferredLayout, _corners, _place, infer_layout
from tests.models.toy_dit import GRID, SOURCE, ToyDiT, toy_inputs


class WidthFirst(ToyDiT):
    """Tokens in the order width, height, frames."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = self.embed(hidden_states).permute(0, 4, 3, 2, 1).flatten(1, 3)
        return self.blocks[0].attn1(x)


class Mixing(ToyDiT):
    """Every token depends on the mean of all before the first attention."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        x = x + x.mean(1, keepdim=True)
        if self.breaks:
            x = torch.cat([self.text(text), x], 1)
        return self.blocks[0].attn1(x)


class Sandwich(ToyDiT):
    """Text on both sides of the video."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        context = self.text(text)
        return self.blocks[0].attn1(torch.cat([context[:, :2], x, context[:, 2:]], 1))


class Between(ToyDiT):
    """The video between any numbers of other tokens."""

    def __init__(self, before: int, behind: int) -> None:
        super().__init__(1)
        self.parts = [before, behind]

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        before, behind = self.text(text).split(self.parts, 1)
        return self.blocks[0].attn1(torch.cat([before, x, behind], 1))


class Twice(ToyDiT):
    """A copy of the video behind it."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        return self.blocks[0].attn1(torch.cat([self.text(text), x, x + 1], 1))


class ChannelsLast(ToyDiT):
    """Latents ``[batch, frames, height, width, channels]``."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        return super().forward(hidden_states.movedim(-1, 1), text)


class Tokens(ToyDiT):
    """Takes tokens, and is not told how many make a frame."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        return self.blocks[0](self.text(hidden_states), self.text(text))


class Deaf(ToyDiT):
    """Attention over as many tokens as the video has, none of them video."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        return self.blocks[0].attn1(x * 0 + 1)


def infer(model: ToyDiT, grid: VideoGrid | None = None, **call: int) -> InferredLayout:
    torch.manual_seed(0)
    inputs = toy_inputs(**call)
    return infer_layout(model, find_attention(model, (), inputs), (), inputs, grid)


@pytest.mark.parametrize("breaks", [False, True], ids=["fullgraph", "graph-breaks"])
def test_every_layer_is_proven(breaks: bool) -> None:
    found = infer(ToyDiT(3, breaks=breaks))
    assert found.source == SOURCE
    assert dict(found.layouts) == {f"blocks.{n}.attn1": TokenLayout(GRID) for n in range(3)}
    assert set(found.evidence.values()) == {"probe"}


def test_text_on_both_sides() -> None:
    assert dict(infer(Sandwich()).layouts) == {"blocks.0.attn1": TokenLayout(GRID, 2, 3)}


FRAME = GRID.tokens_per_frame


@pytest.mark.parametrize(
    ("before", "behind"),
    [(1, 0), (0, 1), (1, 1), (FRAME, 0), (0, FRAME), (FRAME - 1, FRAME + 1), (13, 7),
     (GRID.tokens, 0), (0, GRID.tokens), (GRID.tokens, GRID.tokens)],
)  # fmt: skip
def test_text_of_odd_lengths_on_either_side(before: int, behind: int) -> None:
    found = infer(Between(before, behind), text=before + behind)
    assert dict(found.layouts) == {"blocks.0.attn1": TokenLayout(GRID, before, behind)}
    assert dict(found.evidence) == {"blocks.0.attn1": "probe"}


size = st.integers(1, 7)


@given(size, size, size, st.integers(0, 50), st.integers(0, 50), st.permutations(range(3)))
def test_only_a_frame_major_order_is_placed(
    frames: int, height: int, width: int, prefix: int, suffix: int, order: list[int]
) -> None:
    grid = VideoGrid(frames, height, width)
    tokens = torch.arange(grid.tokens).view(frames, height, width)
    # Where each token lies in a sequence whose outermost axis is order[0].
    lies = torch.empty(grid.tokens, dtype=torch.long)
    lies[tokens.permute(order).flatten()] = torch.arange(grid.tokens)
    moved = [(prefix + int(lies[tokens[corner]]),) for corner in _corners(grid)]
    verdict = _place(moved, prefix + suffix, grid)
    if torch.equal(lies, torch.arange(grid.tokens)):
        assert verdict == (prefix, "probe")
    else:
        assert isinstance(verdict, str)


def test_of_two_copies_the_first_counts() -> None:
    layout = TokenLayout(GRID, 5, GRID.tokens)
    found = infer(Twice())
    assert dict(found.layouts) == {"blocks.0.attn1": layout}
    assert dict(found.evidence) == {"blocks.0.attn1": "probe"}


def test_channels_may_come_last() -> None:
    model, inputs = ChannelsLast(1), toy_inputs()
    inputs["hidden_states"] = inputs["hidden_states"].movedim(1, -1)
    found = infer_layout(model, find_attention(model, (), inputs), (), inputs)
    assert found.source.dims == (1, 2, 3)
    assert dict(found.evidence) == {"blocks.0.attn1": "probe"}


def test_a_model_that_takes_tokens_needs_the_callers_word() -> None:
    model = Tokens()
    inputs = {**toy_inputs(), "hidden_states": torch.randn(1, GRID.tokens, 8)}
    sites = find_attention(model, (), inputs)
    with pytest.raises(LayoutError, match=r"give Config\.grid"):
        infer_layout(model, sites, (), inputs)
    found = infer_layout(model, sites, (), inputs, GRID)
    assert dict(found.layouts) == {"blocks.0.attn1": TokenLayout(GRID)}
    assert dict(found.evidence) == {"blocks.0.attn1": "probe"}
    assert found.source.read(inputs) == GRID


def test_another_token_order_is_refused() -> None:
    with pytest.raises(LayoutError, match="frame-major"):
        infer(WidthFirst())


def test_attention_that_never_sees_the_video_is_refused() -> None:
    with pytest.raises(LayoutError, match="not attention over video"):
        infer(Deaf())


def test_where_tokens_mix_early_the_length_must_do() -> None:
    found = infer(Mixing())
    assert dict(found.evidence) == {"blocks.0.attn1": "length"}


def test_where_tokens_mix_early_text_cannot_be_placed() -> None:
    with pytest.raises(LayoutError, match="cannot tell where they lie"):
        infer(Mixing(breaks=True))


def test_the_callers_word_is_checked() -> None:
    assert infer(ToyDiT(1), grid=GRID).grid == GRID
    with pytest.raises(LayoutError, match="to be VideoGrid"):
        infer(ToyDiT(1), grid=VideoGrid(GRID.frames, GRID.width, GRID.height))


def test_a_model_without_video_is_an_error() -> None:
    with pytest.raises(LayoutError, match="5-D video latent"):
        find_attention(torch.nn.Linear(2, 2), (torch.randn(1, 2),), {})
