"""Classification on graphs made by hand; real models are in tests/models."""

import operator

import pytest
import torch

from evdit_opt.passes.canonicalize_attention import canonicalize_attention
from evdit_opt.passes.find_attention import AttentionSite, classify
from tests.passes.graph_builder import GraphBuilder

FRAMES, HEIGHT, WIDTH = 4, 2, 3
VIDEO = FRAMES * HEIGHT * WIDTH


def start(batch: int = 1) -> tuple[GraphBuilder, torch.fx.Node, torch.fx.Node]:
    """A graph with embedded video ``[batch, seq, 16]`` and text of the same length."""
    build = GraphBuilder()
    video = build.input("l_hidden_states_", batch, 4, FRAMES, HEIGHT, WIDTH)
    text = build.input("l_text_", batch, VIDEO, 16)
    x = build.embed(video)
    build.layer = "blocks.0.attn1"
    return build, x, text


def only(build: GraphBuilder, batch: int = 1) -> AttentionSite:
    (found,) = classify(build.graph, build.names, batch)
    return found


def test_self_attention_over_video_is_a_site() -> None:
    build, x, _ = start()
    build.attend(x)
    found = only(build)
    assert found.is_site
    assert found.name == "blocks.0.attn1"
    assert (found.q_len, found.kv_len, found.heads, found.head_dim) == (VIDEO, VIDEO, 2, 8)


def test_cross_attention_to_text_as_long_as_the_video_is_not() -> None:
    build, x, text = start()
    build.attend(x, text)
    found = only(build)
    assert not found.is_site
    assert "cross-attention" in found.reason


def test_text_only_attention_as_long_as_the_video_is_not() -> None:
    build, _, text = start()
    build.attend(text)
    assert "does not descend from the video" in only(build).reason


def test_tokens_known_to_be_the_video_are_the_video() -> None:
    build = GraphBuilder()
    video, text = (build.input(f"l_{name}_", 1, VIDEO, 16) for name in ("video", "text"))
    build.layer = "blocks.0.attn1"
    build.attend(video)
    build.layer = "text.0.attn1"
    build.attend(text)
    unknown = classify(build.graph, build.names, 1)
    assert [found.is_site for found in unknown] == [True, True], "the probe has to decide"
    known = classify(build.graph, build.names, 1, {video})
    assert [found.is_site for found in known] == [True, False]
    assert "does not descend from the video" in known[1].reason


def test_joint_attention_of_video_and_text_is_a_site() -> None:
    build, x, text = start()
    q, k, v = (
        build.heads(build.call(torch.cat, [build.linear(text), build.linear(x)], 1)) for _ in "qkv"
    )
    build.call(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    found = only(build)
    assert found.is_site
    assert found.q_len == 2 * VIDEO


def test_adapters_do_not_hide_a_site() -> None:
    build, x, _ = start()
    q, k, v = (
        build.heads(build.add(build.linear(x), build.linear(build.linear(x, 2), 16))) for _ in "qkv"
    )
    build.call(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    assert only(build).is_site


@pytest.mark.parametrize("folded", ["temporal", "spatial"])
def test_factorised_attention_is_not(folded: str) -> None:
    build, x, _ = start()
    if folded == "spatial":  # frames in the batch
        x = build.call(torch.reshape, x, (FRAMES, HEIGHT * WIDTH, 16))
    else:  # positions in the batch
        x = build.call(torch.reshape, x, (FRAMES, HEIGHT * WIDTH, 16))
        x = build.call(torch.transpose, x, 0, 1)
    build.attend(x)
    assert "folded into the batch" in only(build).reason


def test_heads_in_the_batch_are_not_frames_in_the_batch() -> None:
    build, x, _ = start()
    q, k, v = (
        build.call(
            torch.unsqueeze, build.call(torch.flatten, build.heads(build.linear(x)), 0, 1), 1
        )
        for _ in "qkv"
    )
    build.call(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    found = only(build)
    assert found.is_site
    assert (found.batch, found.heads) == (2, 1)


def test_frames_folded_after_the_projection_are_seen() -> None:
    build, x, _ = start()
    q, k, v = (
        build.heads(build.call(torch.reshape, build.linear(x), (FRAMES, HEIGHT * WIDTH, 16)))
        for _ in "qkv"
    )
    build.call(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    assert "folded into the batch" in only(build).reason


def test_attention_sample_by_sample_is_a_site() -> None:
    build, x, _ = start(batch=2)
    build.attend(build.call(operator.getitem, x, slice(0, 1)))
    assert only(build, batch=2).is_site


def test_causal_attention_is_not() -> None:
    build, x, _ = start()
    build.attend(x, is_causal=True)
    found = only(build)
    assert found.causal
    assert found.reason == "causal attention"


@pytest.mark.parametrize(
    ("shape", "kind", "is_site"),
    [((1, 1, 1, VIDEO), "key padding", True), ((1, 1, VIDEO, VIDEO), "other", False)],
    ids=["key-padding", "query-dependent"],
)
def test_masks(shape: tuple[int, ...], kind: str, is_site: bool) -> None:
    build, x, _ = start()
    mask = build.input("l_mask_", *shape)
    build.attend(x, attn_mask=mask)
    found = only(build)
    assert (found.mask_kind, found.is_site) == (kind, is_site)


def test_an_attention_whose_module_dynamo_lost_is_not() -> None:
    build, x, _ = start()
    build.layer = ""
    build.attend(x)
    assert "lost the name" in only(build).reason


def test_the_site_is_the_module_around_projections_and_attention() -> None:
    build, x, _ = start()
    build.layer = "blocks.0.qkv"
    q, k, v = (build.heads(build.linear(x)) for _ in "qkv")
    build.layer = "blocks.0.core"
    build.call(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    assert only(build).name == "blocks.0"


def test_attention_that_is_spelled_out_and_left_alone_says_why() -> None:
    build, x, _ = start()
    build.layer = "blocks.0.attn1"
    q, k, v = (build.heads(build.linear(x)) for _ in "qkv")
    scores = build.call(torch.matmul, q, build.call(torch.transpose, k, 2, 3))
    weights = build.call(torch.softmax, scores, -1)
    gm = build.module(build.call(torch.matmul, weights, v), weights)
    canonicalize_attention(gm)
    found = only(build)
    assert (found.name, found.is_site) == ("blocks.0.attn1", False)
    assert "used elsewhere" in found.reason
    assert (found.q_len, found.kv_len, found.heads) == (VIDEO, VIDEO, 2)
