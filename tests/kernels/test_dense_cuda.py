"""The fused CUDA kernels: which one a call takes, what it is handed, and (on a GPU) its numbers."""

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import decomposed, decomposed_backward, dense, dense_cuda, tile_attention
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import Rule
from tests.kernels.oracle import strided
from tests.tolerance import assert_close_to_fp64

KERNELS: tuple[dense_cuda.Kernel, ...] = ("cudnn", "flash", "efficient")
SCHEMAS = {
    "_scaled_dot_product_cudnn_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal", 9),
    "_scaled_dot_product_flash_attention": ("query key value dropout_p is_causal", 9),
    "_scaled_dot_product_efficient_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal", 4),
    "_scaled_dot_product_cudnn_attention_backward": (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q "
        "cum_seq_k max_q max_k dropout_p is_causal", 3),
    "_scaled_dot_product_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
        "is_causal philox_seed philox_offset", 3),
    "_scaled_dot_product_efficient_attention_backward": (
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p "
        "grad_input_mask is_causal", 4),
}  # fmt: skip
# What copies elements, and what makes the host wait for the device.
COPIES = ("clone", "copy_", "constant_pad_nd", "contiguous", "cat")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select", "unique")


@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_take_what_is_passed(name: str) -> None:
    arguments, results = SCHEMAS[name]
    schema = getattr(torch.ops.aten, name).default._schema
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    expected = arguments.split()
    assert positional[: len(expected)] == expected
    # What follows has defaults.
    assert all(a.has_default_value() for a in schema.arguments[len(expected) :])
    assert "scale" in [argument.name for argument in schema.arguments if argument.kwarg_only]
    assert len(schema.returns) == results
    assert all(str(result.type) == "Tensor" for result in schema.returns[:2])


class Recorder(TorchDispatchMode):
    """Names and arguments of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls.append((function.overloadpacket.__name__, args))
        return function(*args, **(kwargs or {}))

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def attention(self) -> list[tuple[str, tuple[Any, ...]]]:
        return [call for call in self.calls if call[0].startswith("_scaled_dot_product")]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Tensors without data that pass for those of a Hopper GPU, and what is done to them."""
    set_chip(monkeypatch, (9, 0))
    dense_cuda._cudnn_lse_has_four_dims()  # its own question to a meta kernel is not recorded
    with Recorder() as recorder:
        yield recorder


def set_chip(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int | None = 91900
) -> None:
    monkeypatch.setattr(dense_cuda, "DEVICES", ("meta",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)


def fake(
    dtype: torch.dtype = torch.bfloat16, heads: int = 2, tokens: int = 70, width: int = 64
) -> Tensor:
    return torch.empty(1, tokens, heads, width, dtype=dtype, device="meta").transpose(1, 2)


@pytest.mark.parametrize(
    ("chip", "dtype", "width", "has_bias", "forward", "backward"),
    [
        ((9, 0), torch.bfloat16, 128, False, "cudnn", "cudnn"),
        ((10, 0), torch.float16, 96, False, "cudnn", "cudnn"),
        ((9, 0), torch.bfloat16, 99, False, "cudnn", "cudnn"),  # filled up to 104
        ((9, 0), torch.bfloat16, 130, False, "flash", "flash"),
        ((9, 0), torch.bfloat16, 128, True, "efficient", "efficient"),
        ((9, 0), torch.float32, 64, False, "efficient", "efficient"),
        ((9, 0), torch.float64, 64, False, None, None),
        ((8, 0), torch.bfloat16, 256, False, "flash", "flash"),
        ((8, 9), torch.bfloat16, 256, False, "flash", "efficient"),
        ((12, 0), torch.float16, 192, False, "flash", "flash"),
        ((7, 5), torch.float16, 64, False, "efficient", "efficient"),
        ((7, 5), torch.bfloat16, 64, False, None, None),
    ],
)
def test_choice(
    chip: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    has_bias: bool,
    forward: str | None,
    backward: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_chip(monkeypatch, chip)
    x = fake(dtype, width=width)
    assert dense_cuda.choose(x, x, has_bias) == forward
    assert dense_cuda.choose(x, x, has_bias, backward=True) == backward


@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        (lambda patch: set_chip(patch, (9, 0), cudnn=91002), "flash"),
        (lambda patch: set_chip(patch, (9, 0), cudnn=None), "flash"),
        (lambda patch: patch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False),
         "flash"),
        (lambda patch: patch.setattr(dense_cuda, "current_flash_attention_impl", lambda: "FA3"),
         "flash"),
        (lambda patch: patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True),
         "flash"),
    ],
    ids=["old cuDNN", "no cuDNN", "cuDNN off", "flash-attn 3", "deterministic"],
)  # fmt: skip
def test_choice_without_cudnn(
    switch: Callable[[pytest.MonkeyPatch], None], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chip(monkeypatch, (9, 0))
    switch(monkeypatch)
    assert dense_cuda.choose(fake(), fake(), False) == expected


def test_choice_obeys_pytorch_s_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chip(monkeypatch, (9, 0))
    backend = torch.nn.attention.SDPBackend
    x, one = fake(), fake(tokens=1)
    assert dense_cuda.choose(x, one, False) == "flash"  # cuDNN takes no single key
    for allowed, expected in (
        (backend.FLASH_ATTENTION, "flash"),
        (backend.EFFICIENT_ATTENTION, "efficient"),
        (backend.CUDNN_ATTENTION, "cudnn"),
        (backend.MATH, None),
    ):
        with torch.nn.attention.sdpa_kernel(allowed):
            assert dense_cuda.choose(x, x, False) == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_inputs_are_not_copied(hopper: Recorder, kernel: dense_cuda.Kernel) -> None:
    packed = torch.empty(1, 300, 3, 2, 64, dtype=torch.bfloat16, device="meta")
    q, k, v = (packed[:, :, n].transpose(1, 2) for n in range(3))
    q, k, v = q[:, :, 10:90], k[:, :, 100:233], v[:, :, 100:233]
    hopper.calls.clear()
    out, lse = dense_cuda.attend(q, k, v, None, 0.1, kernel)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert not set(hopper.names()) & {*COPIES, *WAITS}
    ((_, arguments),) = hopper.attention()
    assert [x.stride() for x in arguments[:3]] == [q.stride(), k.stride(), v.stride()]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", [64, 72, 99])
def test_forward_and_backward_calls_are_valid(
    hopper: Recorder, width: int, kernel: dense_cuda.Kernel
) -> None:
    q, k, v, out, grad = (fake(width=width, tokens=n) for n in (70, 45, 45, 70, 70))
    result, lse = dense_cuda.attend(q, k, v, None, 0.1, kernel)
    assert result.shape == q.shape
    lse = torch.empty(1, 70, 2, device="meta").transpose(1, 2)
    hopper.calls.clear()
    grads = dense_cuda.attend_backward(grad, q, k, v, None, out, lse, 0.1, kernel)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    assert not set(hopper.names()) & set(WAITS)
    ((_, arguments),) = hopper.attention()
    given_lse = arguments[6 if kernel == "efficient" else 5]
    assert given_lse.is_contiguous()
    expected = {"cudnn": [(1, 2, 70), (1, 2, 70, 1)], "flash": [(1, 2, 70)]}
    assert given_lse.shape in expected.get(kernel, [(1, 2, 96)])  # a multiple of 32 queries


def test_cudnn_gets_out_and_its_gradient_in_equal_strides(hopper: Recorder) -> None:
    q, k, out = fake(), fake(), fake()
    grad = torch.empty(1, 2, 70, 64, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(1, 2, 70, device="meta")
    dense_cuda.attend_backward(grad, q, k, k, None, out, lse, 0.1, "cudnn")
    ((_, (given_grad, _, _, _, given_out, *_)),) = hopper.attention()
    assert given_grad.stride() == given_out.stride()


def test_the_efficient_kernel_gets_out_with_heads_inside(hopper: Recorder) -> None:
    """It takes for granted that tokens of out lie heads * head_dim apart."""
    q = fake()
    out = torch.empty(1, 2, 70, 64, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(1, 1, 1, 70, device="meta")
    lse = torch.empty(1, 2, 70, device="meta")
    dense_cuda.attend_backward(q, q, q, q, bias, out, lse, 0.1, "efficient")
    ((_, arguments),) = hopper.attention()
    assert arguments[5].stride(2) == 2 * 64
    bias_stride = arguments[4].stride()
    assert arguments[4].shape == (1, 2, 70, 70)
    assert bias_stride[2:] == (0, 1)


def test_misaligned_inputs_are_copied(hopper: Recorder) -> None:
    odd = torch.empty(1, 2, 70, 100, dtype=torch.bfloat16, device="meta")[..., 4:68]
    one_key = fake(tokens=1).expand(1, 2, 70, 64)
    for x in (odd, one_key):
        hopper.calls.clear()
        dense_cuda.attend(x, fake(), fake(), None, 0.1, "flash")
        ((_, arguments),) = hopper.attention()
        assert "clone" in hopper.names()
        assert all(step > 0 and step % 8 == 0 for step in arguments[0].stride()[:-1])


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padding"])
@pytest.mark.parametrize("weighting", ["none", "balanced"])
def test_the_decomposition_never_waits_for_the_device(
    hopper: Recorder, weighting: Any, padded: bool
) -> None:
    geometry = Geometry(frames=9, tokens=40, prefix=5, suffix=3)
    q, k, v = (fake(heads=4, tokens=geometry.seq_len) for _ in range(3))
    attn_mask = torch.empty(1, 1, 1, geometry.seq_len, dtype=torch.bool, device="meta")
    segments = Rule(2, 1, weighting).mask(9).segments()
    arguments = (attn_mask if padded else None, *segments, geometry, 0.1)

    def run() -> None:
        hopper.calls.clear()
        out, lse = decomposed.forward(q, k, v, *arguments)
        used = {name for name, _ in hopper.attention()}
        grads = decomposed_backward.backward(torch.empty_like(q), q, k, v, out, lse, *arguments)
        kernel = "_scaled_dot_product_" + ("efficient" if padded else "cudnn") + "_attention"
        assert used == {kernel}
        assert {name for name, _ in hopper.attention()} - used == {f"{kernel}_backward"}
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]

    run()
    sends = AssertionError("numbers are sent to the device again")
    with (
        mock.patch.object(Tensor, "new_tensor", side_effect=sends),
        mock.patch.object(torch, "tensor", side_effect=sends),
    ):
        run()
    assert not set(hopper.names()) & set(WAITS)


def oracle(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * 0.2
    if bias is not None:
        logits = logits + bias.to(dtype)
    lse = torch.logsumexp(logits.double(), -1)
    shift = lse.masked_fill(lse.isneginf(), 0.0).to(dtype)
    return (logits - shift.unsqueeze(-1)).exp() @ v.to(dtype), lse


CASES = [
    (kernel, dtype, width)
    for kernel, widths in (("cudnn", (64, 96, 128)), ("flash", (64, 72, 99, 256)),
                           ("efficient", (64, 96, 80)))
    for dtype in (torch.float16, torch.bfloat16) for width in widths
] + [("efficient", torch.float32, 64)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(70, 33, 45), (3600, 200, 129), (1, 31, 2)], ids=str)
@pytest.mark.parametrize("kind", ["transposed", "packed", "contiguous"])
@pytest.mark.parametrize(("kernel", "dtype", "width"), CASES, ids=str)
def test_gradients_of_two_pieces_add_up_on_cuda(
    kernel: dense_cuda.Kernel,
    dtype: torch.dtype,
    width: int,
    kind: str,
    lengths: tuple[int, int, int],
) -> None:
    """Forward over all keys; backward over two parts of them, with the output of all."""
    queries, first, second = lengths
    torch.manual_seed(0)
    seq = max(queries, first + second)
    whole = [x.to("cuda", dtype) for x in strided(kind, 1, seq, (3, 3, 3), width)]
    q, k, v = whole[0][:, :, :queries], *(x[:, :, : first + second] for x in whole[1:])
    if kernel == "cudnn" and not dense_cuda._cudnn_fits(
        q, k[:, :, :first], torch.cuda.get_device_capability(), width
    ):
        pytest.skip("cuDNN's attention cannot run here")
    bias = None
    if kernel == "efficient":
        bias = torch.randn(1, 3, 1, first + second, device="cuda")
        bias[..., ::5] = -math.inf
    out, lse = dense_cuda.attend(q, k, v, bias, 0.2, kernel)
    exact, exact_lse = oracle(q, k, v, bias, torch.float64)
    eager, eager_lse = oracle(q, k, v, bias, dtype)
    assert_close_to_fp64(out, exact, eager, "out")
    assert_close_to_fp64(lse, exact_lse, eager_lse.float(), "lse")

    grad = torch.randn_like(out)
    grads = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
    for part in (slice(0, first), slice(first, None)):
        piece = dense_cuda.attend_backward(
            grad, q, k[:, :, part], v[:, :, part], None if bias is None else bias[..., part],
            out, lse, 0.2, kernel,
        )  # fmt: skip
        grads[0] += piece[0]
        grads[1][:, :, part] += piece[1]
        grads[2][:, :, part] += piece[2]
    truths = []
    for wide in (torch.float64, dtype):
        leaves = [x.detach().to(wide).requires_grad_() for x in (q, k, v)]
        truths.append(torch.autograd.grad(oracle(*leaves, bias, wide)[0], leaves, grad.to(wide)))
    size = max(1.0, *(x.double().norm(dim=-1).max().item() for x in (q, k))) * 0.2
    size *= grad.double().norm(dim=-1).max().item() * v.double().norm(dim=-1).max().item()
    for name, mine, true, plain in zip("qkv", grads, *truths, strict=True):
        assert_close_to_fp64(mine.to(dtype), true, plain, f"gradient of {name}", size=size)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_decomposition_runs_in_cuda_graphs(mode: str) -> None:
    layout = TokenLayout(VideoGrid(6, 50, 1), prefix=7)
    mask = Rule(2, 0, "balanced").mask(6)
    inputs = strided("transposed", 1, layout.seq_len, (4, 4, 4), 64)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in inputs)
    compiled = torch.compile(
        lambda *x: tile_attention(*x, mask, layout, impl="decomposed") * 2.0,
        fullgraph=True, mode=mode,
    )  # fmt: skip
    expected = tile_attention(q, k, v, mask, layout, impl="decomposed") * 2.0
    for _ in range(4):
        assert torch.equal(compiled(q, k, v), expected)


@pytest.mark.gpu
def test_cudnn_s_log_sum_exp_has_the_shape_the_meta_kernel_says() -> None:
    x = torch.randn(1, 2, 70, 64, device="cuda", dtype=torch.bfloat16)
    lse = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1]
    assert (lse.dim() == 4) == dense_cuda._cudnn_lse_has_four_dims()


def test_hidden_keys_are_cleaned_up_after(hopper: Recorder) -> None:
    bias = torch.full((1, 1, 1, 70), -math.inf, device="meta")
    dense.attend(fake(), fake(), fake(), bias, 0.1)
    assert "masked_fill" in hopper.names()
