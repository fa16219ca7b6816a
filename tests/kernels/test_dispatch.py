"""Which implementation a call takes: measured, by rule of thumb, or the one that was asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evdit_opt.errors import MaskError, UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import (
    autotune,
    decomposed,
    dense_cuda,
    dispatch,
    masked,
    pieces,
    reference,
    short_calls,
    tile_attention,
)
from evdit_opt.masks import Rule
from evdit_opt.passes.inline_decomposed import inline_decomposed
from tests.kernels.oracle import oracle, strided

LAYOUT = TokenLayout(VideoGrid(5, 40, 1))
MASK = Rule(2).mask(5)


@pytest.fixture
def measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastest: Callable[..., str]
) -> list[str]:
    """Measuring as users have it, with an empty cache; the implementations that ran."""
    monkeypatch.setattr(dispatch, "_fastest", fastest)
    monkeypatch.setattr(autotune, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(autotune, "_choices", {})
    monkeypatch.setattr(short_calls, "_calls", {})
    ran: list[str] = []
    run = dispatch.run

    def recorded(impl: str, arguments: Any) -> tuple[Tensor, Tensor]:
        ran.append(impl)
        return run(impl, arguments)

    def one_call(*arguments: Any, **options: Any) -> Tensor:
        ran.append("masked")
        return scaled_dot_product_attention(*arguments, **options)

    monkeypatch.setattr(dispatch, "run", recorded)
    monkeypatch.setattr(short_calls, "scaled_dot_product_attention", one_call)
    return ran


def inputs(layout: TokenLayout = LAYOUT) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return strided("transposed", 1, layout.seq_len, (2, 2, 2), 16)


def test_auto_measures_the_first_call_of_a_kind_only(measuring: list[str]) -> None:
    q, k, v = inputs()
    out = tile_attention(q, k, v, MASK, LAYOUT)
    assert set(measuring) == {"decomposed", "masked"}
    assert len(measuring) >= 5  # a warm-up and a round of both, and the call itself
    chosen = measuring[-1]
    measuring.clear()
    assert torch.equal(tile_attention(q, k, v, MASK, LAYOUT), out)  # the same kernel, the same bits
    assert measuring == [chosen]
    (choice,) = autotune.choices()
    assert choice.name == chosen
    assert dict(choice.key)["tokens"] == 40
    autotune._choices.clear()
    short_calls._calls.clear()
    measuring.clear()
    tile_attention(q, k, v, MASK, LAYOUT)  # as another process: from disk
    assert measuring == [chosen]


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: ((q.double(), k.double(), v.double()), {}),
        lambda q, k, v: ((q, k, v), {"attn_mask": torch.ones(1, 1, 1, 200, dtype=torch.bool)}),
        lambda q, k, v: ((q.contiguous(), k, v), {}),
        lambda q, k, v: ((q.repeat(1, 2, 1, 1), k, v), {}),
    ],
    ids=["dtype", "padding", "strides", "heads"],
)
def test_another_kind_is_measured_too(measuring: list[str], change: Any) -> None:
    tensors = inputs()
    tile_attention(*tensors, MASK, LAYOUT)
    tensors, options = change(*tensors)
    tile_attention(*tensors, MASK, LAYOUT, **options)
    assert len(autotune.choices()) == 2


def test_another_dense_kernel_is_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what was chosen under ``sdpa_kernel(...)`` once would hold for ever."""
    geometry = dispatch.Geometry(frames=5, tokens=40, prefix=0, suffix=0)
    arguments = (*inputs(), None, *MASK.segments(), geometry, 0.25)
    kinds = set()
    for kernel in ("cudnn", "flash", None):
        monkeypatch.setattr(dense_cuda, "choose", lambda *_, kernel=kernel: kernel)
        kinds.add(dispatch._kind(arguments))
    monkeypatch.setattr(dispatch, "current_flash_attention_impl", lambda: "FA4")
    assert len(kinds | {dispatch._kind(arguments)}) == 4


def test_tiny_and_long_sequences_are_not_measured(measuring: list[str]) -> None:
    tiny = TokenLayout(VideoGrid(5, 4, 1))
    tile_attention(*inputs(tiny), MASK, tiny)
    long = TokenLayout(VideoGrid(5, 500, 1))
    tile_attention(*inputs(long), MASK, long)
    assert measuring == ["masked", "decomposed"]
    assert all(choice.milliseconds == {} for choice in autotune.choices())


def test_what_a_rule_decides_is_told_once(
    measuring: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="evdit_opt")
    for _ in range(2):
        for tokens in (4, 500):
            layout = TokenLayout(VideoGrid(5, tokens, 1))
            tile_attention(*inputs(layout), MASK, layout, return_lse=True)
            tile_attention(*inputs(layout), MASK, layout, impl="decomposed")
    told = [
        "masked (not measured) for device cpu, tokens 0 to 128",
        "decomposed (not measured) for device cpu, tokens 1025 to any",
    ]
    assert [choice.describe() for choice in autotune.choices()] == told
    assert [record.getMessage() for record in caplog.records] == [f"chose {x}" for x in told]


def test_static_never_measures(measuring: list[str]) -> None:
    tile_attention(*inputs(), MASK, LAYOUT, impl="static")
    assert measuring == ["decomposed"]
    assert autotune.choices() == ()


def test_a_compiled_graph_measures_when_it_runs(measuring: list[str]) -> None:
    compiled = torch.compile(
        lambda *x: tile_attention(*x, MASK, LAYOUT), fullgraph=True, backend="aot_eager"
    )
    tensors = inputs()
    out = compiled(*tensors)
    chosen = measuring[-1]
    assert autotune.choices()[0].name == chosen
    measuring.clear()
    assert torch.equal(compiled(*tensors), out)
    assert measuring == [chosen]


def test_tracing_measures_nothing(measuring: list[str]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in inputs()]
        tile_attention(*fake, MASK, LAYOUT)
    torch.export.export(Exported(), inputs())
    meta = [x.to("meta") for x in inputs()]
    tile_attention(*meta, MASK, LAYOUT)
    assert measuring == []
    assert autotune.choices() == ()


class Exported(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tile_attention(q, k, v, MASK, LAYOUT)


def test_where_it_must_not_measure_the_rule_of_thumb_decides(
    measuring: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_may_measure", lambda q: False)
    tile_attention(*inputs(), MASK, LAYOUT, return_lse=True)
    assert measuring == ["decomposed"]
    monkeypatch.setattr(dispatch, "_may_measure", lambda q: True)
    tile_attention(*inputs(), MASK, LAYOUT, return_lse=True)
    chosen = measuring[-1]
    measuring.clear()
    monkeypatch.setattr(dispatch, "_may_measure", lambda q: False)
    tile_attention(*inputs(), MASK, LAYOUT, return_lse=True)  # what is known already may be used
    assert measuring == [chosen]


@pytest.mark.gpu
def test_a_recorded_cuda_graph_holds_the_rule_of_thumb(measuring: list[str]) -> None:
    q, k, v = (x.cuda().half() for x in inputs())
    tile_attention(q, k, v, MASK, LAYOUT, impl="decomposed")  # warm up
    measuring.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tile_attention(q, k, v, MASK, LAYOUT)
    graph.replay()
    assert measuring == ["decomposed"]
    assert autotune.choices() == ()
    expected, _ = oracle(q.cpu(), k.cpu(), v.cpu(), MASK, LAYOUT)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("impl", ["reference", "decomposed", "masked"])
def test_an_explicit_choice_never_falls_back(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken on purpose")

    module = {"reference": reference, "decomposed": decomposed, "masked": masked}[impl]
    monkeypatch.setattr(module, "forward", broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        tile_attention(*inputs(), MASK, LAYOUT, impl=impl, return_lse=True)


def test_unknown_and_impossible_choices_are_errors_when_traced_too() -> None:
    q, k, v = inputs()
    with pytest.raises(MaskError, match="expected impl to be one of auto, static, reference"):
        tile_attention(q, k, v, MASK, LAYOUT, impl="fastest")
    meta = [x.to("meta") for x in inputs()]
    with pytest.raises(MaskError, match="expected impl"):
        tile_attention(*meta, MASK, LAYOUT, impl="fastest")
    with pytest.raises(UnsupportedInputError, match="impl='triton'"):
        tile_attention(*meta, MASK, LAYOUT, impl="triton")


@pytest.mark.parametrize(
    ("impl", "device", "seq_len", "expected"),
    [
        ("flex", "cpu", 10, "flex"),
        ("static", "cuda", 128, "masked"),
        ("static", "cuda", 129, "decomposed"),
        ("auto", "cuda", 128, "masked"),
        ("auto", "cuda", 10**5, "auto"),
        ("auto", "cpu", 1024, "auto"),
        ("auto", "cpu", 1025, "decomposed"),
    ],
)
def test_what_is_known_before_anything_runs(
    impl: str, device: str, seq_len: int, expected: str
) -> None:
    assert dispatch.resolve(impl, torch.device(device), seq_len) == expected


@pytest.mark.parametrize("padded", [False, True])
def test_a_compiler_decides_before_the_first_call(measuring: list[str], padded: bool) -> None:
    """On tensors without numbers, strides and overlaps included."""
    tensors = inputs()
    attn_mask = torch.ones(1, 1, 1, LAYOUT.seq_len, dtype=torch.bool) if padded else None
    geometry = dispatch.Geometry(frames=5, tokens=40, prefix=0, suffix=0)

    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    fake = [None if x is None else mode.from_tensor(x) for x in (*tensors, attn_mask)]
    impl = dispatch.decide("auto", *fake, *MASK.segments(), geometry)
    (choice,) = autotune.choices()
    assert choice.name == impl
    assert set(choice.milliseconds) == {"decomposed", "masked"}
    assert dispatch.decide("flex", *fake, *MASK.segments(), geometry) == "flex"
    assert dispatch.decide("static", *fake, *MASK.segments(), geometry) == "decomposed"
    assert measuring == []


@pytest.mark.usefixtures("measuring")
def test_what_is_inlined_was_measured_while_it_was_compiled() -> None:
    arguments = (None, *map(list, MASK.segments()), 5, 40, 0, 0, None, "auto")
    op = torch.ops.evdit.tile_attention.default
    with torch.no_grad():
        torch.compile(lambda *x: op(*x, *arguments)[0], backend=inlined)(*inputs())
    (choice,) = autotune.choices()
    assert dict(choice.key)["direction"] == "inlined forward"


def inlined(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
    assert inline_decomposed(gm) == 1
    return gm


@pytest.mark.usefixtures("measuring")
def test_only_the_dense_calls_of_what_is_inlined_are_timed() -> None:
    q, k, v = inputs()
    geometry = dispatch.Geometry(frames=5, tokens=40, prefix=0, suffix=0)
    arguments = (q, k, v, None, *MASK.segments(), geometry, 0.25)
    for name in ("decomposed", "masked"):
        again = dispatch._attention_calls(name, arguments)
        with (
            mock.patch.object(torch, "cat", side_effect=AssertionError),
            mock.patch.object(pieces, "merge", side_effect=AssertionError),
        ):
            outs = again()
        pairs = sum(out.shape[0] * out.shape[2] for out, _ in outs)  # rows of every call
        assert pairs == (200 if name == "masked" else 2 * 40 + 2 * 120)


def test_random_tensors_keep_strides_that_overlap() -> None:
    x = torch.zeros(1, 2, 1, 5).expand(3, 2, 4, 5)
    like = dispatch._random_like(x)
    assert (like.shape, like.stride()) == (x.shape, x.stride())


def test_density_is_that_of_the_mask() -> None:
    for rule in (Rule(1), Rule(2, 1, "balanced"), Rule(0, 1)):
        mask = rule.mask(9)
        intervals, _ = mask.segments()
        assert dispatch._density_bucket(intervals, 9) == round(16 * mask.density) / 16
