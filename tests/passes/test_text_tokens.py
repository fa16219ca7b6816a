"""Where the text lies in the forward that is compiled; plain cases are in test_swap_attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from evdit_opt.errors import LayoutError
from evdit_opt.masks import Rule
from evdit_opt.passes.site_mark import SiteSpec
from evdit_opt.passes.text_tokens import text_tokens
from tests.passes.graph_builder import GraphBuilder

FRAMES, TOKENS = 4, 6
VIDEO = FRAMES * TOKENS
HISTORY, TEXT = 5, 7
SPEC = SiteSpec(Rule(1), HISTORY, TEXT)


def joined(*parts: int) -> tuple[GraphBuilder, fx.Node]:
    """Queries ``[1, 2, seq, 8]`` of a module that projects and then joins so many tokens."""
    build = GraphBuilder()
    projected = [build.linear(build.input(f"l_{n}_", 1, size, 16)) for n, size in enumerate(parts)]
    return build, build.heads(build.call(torch.cat, projected, 1))


def place(build: GraphBuilder, q: fx.Node, spec: SiteSpec = SPEC) -> tuple[object, object]:
    return text_tokens(build.graph, q, FRAMES, TOKENS, spec, "blocks.0")


def test_text_on_both_sides_as_calibrated() -> None:
    assert place(*joined(HISTORY + VIDEO + TEXT)) == (HISTORY, TEXT)


@pytest.mark.parametrize("text", [1, 30])
def test_text_of_any_length_joined_behind_the_video(text: int) -> None:
    assert place(*joined(HISTORY + VIDEO, text)) == (HISTORY, text)
    assert place(*joined(HISTORY, VIDEO + text)) == (HISTORY, text)
    assert place(*joined(HISTORY, VIDEO, text)) == (HISTORY, text)


@pytest.mark.parametrize(
    "parts",
    [
        (HISTORY + VIDEO + 30,),
        (HISTORY + 1 + VIDEO, 30),
        (30, VIDEO + TEXT),
        (VIDEO, HISTORY + 30),
        (HISTORY + 1, VIDEO, TEXT - 1),
    ],
    ids=["not-joined", "more-history", "as-long", "elsewhere", "same-sum"],
)
def test_where_it_cannot_be_known_is_an_error(parts: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match=r"blocks\.0.*after 5 and before 7"):
        place(*joined(*parts))


sizes = st.integers(1, 9)
text = st.integers(0, 40)


@given(
    frames=sizes,
    tokens=sizes,
    prefix=text,
    suffix=text,
    more=st.integers(-9, 60),
    fit=st.booleans(),
)
def test_a_sequence_of_any_length_is_placed_as_calibrated_or_refused(
    frames: int, tokens: int, prefix: int, suffix: int, more: int, fit: bool
) -> None:
    found = prefix + suffix if fit else more
    length = max(0, frames * tokens + found)
    found = length - frames * tokens
    build = GraphBuilder()
    q = build.input("l_q_", 1, 2, length, 8)
    spec = SiteSpec(Rule(1), prefix, suffix)
    both, neither = bool(prefix and suffix), not prefix and not suffix
    if found < 0 or (both and found != prefix + suffix) or (neither and found):
        with pytest.raises(LayoutError):
            text_tokens(build.graph, q, frames, tokens, spec, "blocks.0")
        return
    expected = (prefix, suffix) if both else (found, 0) if prefix else (0, found)
    assert text_tokens(build.graph, q, frames, tokens, spec, "blocks.0") == expected


@given(prefix=sizes, suffix=sizes, before=sizes, behind=st.integers(1, 40))
def test_what_the_module_joins_is_never_misplaced(
    prefix: int, suffix: int, before: int, behind: int
) -> None:
    spec = SiteSpec(Rule(1), prefix, suffix)
    for parts in ((before, VIDEO, behind), (before + VIDEO, behind), (before, VIDEO + behind)):
        build, q = joined(*parts)
        if before == prefix:
            assert place(build, q, spec) == (before, behind)
        elif VIDEO + before != prefix:
            with pytest.raises(LayoutError):
                place(build, q, spec)


def test_what_another_module_joined_does_not_count() -> None:
    build, x = joined(HISTORY + VIDEO, 30)
    merged = build.call(torch.flatten, build.call(torch.transpose, x, 1, 2), 2)
    with pytest.raises(LayoutError):
        place(build, build.heads(build.linear(merged)))


def test_lengths_only_the_run_can_tell() -> None:
    build = GraphBuilder()
    kept = build.input("l_keep_", 9, dtype=torch.bool)
    build.mode.shape_env = ShapeEnv()
    build.mode.allow_scalar_outputs = True
    rows = build.call(torch.nonzero, kept)
    text = build.call(torch.unsqueeze, build.call(torch.Tensor.float, rows), 0)
    text = build.linear(text, 16)
    video = build.linear(build.input("l_x_", 1, HISTORY + VIDEO, 16))
    q = build.heads(build.call(torch.cat, [video, text], 1))
    prefix, suffix = place(build, q)
    assert prefix == HISTORY
    assert isinstance(suffix, fx.Node)
    gm = build.module(suffix)
    values = {"l_keep_": torch.arange(9) < 4, "l_x_": torch.zeros(1, HISTORY + VIDEO, 16)}
    sizes = [node.meta["example_value"].shape for node in gm.graph.find_nodes(op="placeholder")]
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    arguments = [
        values.get(name, torch.zeros(size)) for name, size in zip(names, sizes, strict=True)
    ]
    assert gm(*arguments) == (4,)
