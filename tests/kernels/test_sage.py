"""SageAttention as the dense kernel, when asked for; here a stand-in with its signature."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import dispatch, sage, tile_attention
from evdit_opt.kernels.dense import attend
from evdit_opt.masks import Rule
from tests.kernels.oracle import oracle, strided
from tests.tolerance import assert_close_to_fp64

LAYOUT = TokenLayout(VideoGrid(5, 21, 1), prefix=3)
MASK = Rule(2, 0, "balanced").mask(5)


def install(monkeypatch: pytest.MonkeyPatch, sageattn: Callable[..., object]) -> None:
    module = ModuleType("sageattention")
    module.__spec__ = ModuleSpec("sageattention", None)
    module.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", module)
    monkeypatch.setattr(sage, "DEVICES", ("cpu",))
    look_again()


def look_again() -> None:
    sage._is_installed.cache_clear()
    sage._returns_lse.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A module with SageAttention 2's signature, exact and on the CPU; the scales it was given."""
    scales: list[float] = []

    def sageattn(
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
        sm_scale: float | None = None, return_lse: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert (tensor_layout, is_causal, return_lse) == ("HND", False, True)
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert sm_scale is not None
        scales.append(sm_scale)
        return attend(q, k, v, None, sm_scale)

    install(monkeypatch, sageattn)
    return scales


@pytest.fixture(autouse=True)
def _look_again() -> None:
    look_again()


def inputs(dtype: torch.dtype = torch.float16) -> list[Tensor]:
    torch.manual_seed(0)
    return [x.to(dtype) for x in strided("transposed", 2, LAYOUT.seq_len, (4, 2, 2), 32)]


def test_every_dense_call_is_sage_s(installed: list[float]) -> None:
    q, k, v = inputs()
    out, lse = tile_attention(q, k, v, MASK, LAYOUT, scale=0.2, impl="sage", return_lse=True)
    assert set(installed) == {0.2}
    exact, exact_lse = oracle(q, k, v, MASK, LAYOUT, 0.2)
    eager, eager_lse = oracle(q, k, v, MASK, LAYOUT, 0.2, dtype=q.dtype)
    assert_close_to_fp64(out, exact, eager, "out")
    assert_close_to_fp64(lse, exact_lse, eager_lse.float(), "lse")


def test_nobody_gets_it_unasked(installed: list[float]) -> None:
    for impl in ("auto", "static", "decomposed"):
        tile_attention(*inputs(), MASK, LAYOUT, impl=impl)
    assert installed == []
    geometry = dispatch.Geometry(frames=5, tokens=21, prefix=3, suffix=0)
    assert "sage" not in dispatch._candidates(inputs()[0], geometry)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.usefixtures("installed")
def test_what_it_cannot_do_is_an_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sage, "DEVICES", (device,))
    tensors = [x.to(device) for x in inputs()]
    padding = torch.ones(1, 1, 1, LAYOUT.seq_len, dtype=torch.bool, device=device)
    with pytest.raises(UnsupportedInputError, match="no attn_mask for impl='sage'"):
        tile_attention(*tensors, MASK, LAYOUT, attn_mask=padding, impl="sage")
    with pytest.raises(UnsupportedInputError, match="float16 or bfloat16"):
        tile_attention(*(x.float() for x in tensors), MASK, LAYOUT, impl="sage")
    monkeypatch.setattr(sage, "DEVICES", ("cuda",))
    with pytest.raises(UnsupportedInputError, match="on a CUDA device for impl='sage'"):
        tile_attention(*tensors, MASK, LAYOUT, impl="sage")


@pytest.mark.usefixtures("installed")
def test_it_has_no_gradient() -> None:
    tensors = [x.requires_grad_() for x in inputs()]
    out = tile_attention(*tensors, MASK, LAYOUT, impl="sage")
    with pytest.raises(UnsupportedInputError, match="no gradients for impl='sage'"):
        out.sum().backward()


def test_without_it_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedInputError, match=r"SageAttention 2 .* not installed"):
        tile_attention(*inputs(), MASK, LAYOUT, impl="sage")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_version_1_is_an_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It returns one tensor, whose two samples were taken for an output and a log-sum-exp."""

    def sageattn(q: Tensor, k: Tensor, v: Tensor, sm_scale: float = 1.0, **_: object) -> Tensor:
        return attend(q, k, v, None, sm_scale)[0]

    install(monkeypatch, sageattn)
    monkeypatch.setattr(sage, "DEVICES", (device,))
    with pytest.raises(UnsupportedInputError, match=r"SageAttention 2 .*, got an older one"):
        tile_attention(*(x.to(device) for x in inputs()), MASK, LAYOUT, impl="sage")
