"""Which implementation runs: the one place that decides."""

import importlib.util
import platform
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from evdit_opt.errors import MaskError, UnsupportedInputError
from evdit_opt.kernels import (
    autotune,
    decomposed,
    decomposed_backward,
    dense,
    dense_cuda,
    masked,
    reference,
    sage,
)
from evdit_opt.kernels.geometry import Geometry

__all__ = ["IMPLEMENTATIONS", "backward", "check", "choose", "decide", "forward", "resolve", "run"]

IMPLEMENTATIONS = (
    "auto", "static", "reference", "decomposed", "masked", "triton", "flex", "flex_flash", "sage",
)  # fmt: skip
# Up to here nothing beats a single call with a mask; beyond the second, it never wins.
TINY_SEQ = 128
SHORT_SEQ = 1024
DENSITY_BUCKETS = 16
# Compiled, the merges and copies of "decomposed" take up to this share of its attention calls.
AROUND = 1.1

Arguments = tuple[
    Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...], tuple[float, ...], Geometry, float
]


def check(impl: str, q: Tensor, geometry: Geometry, attn_mask: Tensor | None = None) -> None:
    """Check that an implementation can run on tensors like these; their values do not matter.

    Raises:
        MaskError: if there is no such implementation.
        UnsupportedInputError: if it cannot run on these tensors.
    """
    _require_name(impl)  # "auto" and "static" choose what can run
    if impl == "masked":
        masked.check(geometry)
    if impl == "sage":
        sage.check(q, attn_mask)
    if impl in ("flex", "flex_flash"):
        from evdit_opt.kernels import flex

        flex.check(q, "AUTO" if impl == "flex" else "FLASH")
    if impl == "triton":
        if not _has_triton():
            raise UnsupportedInputError(
                "expected Triton for impl='triton', it is not installed; pip install triton, or "
                "use impl='auto' or 'decomposed'"
            )
        # Lazy, as everywhere below: importing this package must not import Triton.
        from evdit_opt.kernels import triton_launch

        triton_launch.check_supported(q)


def resolve(impl: str, device: torch.device, seq_len: int) -> str:
    """The implementation a name stands for, as far as that is known before anything runs.

    Returns:
        One of ``IMPLEMENTATIONS``, never "static"; "auto" where a measurement decides.

    Raises:
        MaskError: if there is no such implementation.
    """
    _require_name(impl)
    if impl == "static" or (impl == "auto" and seq_len <= TINY_SEQ):
        return "masked" if seq_len <= TINY_SEQ else "decomposed"
    if impl == "auto" and device.type == "cpu" and seq_len > SHORT_SEQ:
        return "decomposed"
    return impl


def _resolve_aloud(impl: str, device: torch.device, seq_len: int) -> str:
    """:func:`resolve`; what "auto" takes by a rule is told, as what it measures is."""
    resolved = resolve(impl, device, seq_len)
    if impl == "auto" != resolved:
        low, high = (0, TINY_SEQ) if seq_len <= TINY_SEQ else (SHORT_SEQ + 1, "any")
        autotune.ruled(resolved, (("device", device.type), ("tokens", f"{low} to {high}")))
    return resolved


def decide(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
) -> str:
    """The implementation a name stands for on tensors like these: a compiler has no real ones.

    Where "auto" would measure at the first call, it is measured now, on random numbers. On a CPU
    the compiler fuses what lies around the attention calls, so those alone are timed there.

    Args:
        impl: one of ``IMPLEMENTATIONS``.
        q: as of :func:`forward`, and so is the rest; only sizes, strides, dtype and device count.

    Returns:
        One of ``IMPLEMENTATIONS``, never "static" or "auto".
    """
    impl = _resolve_aloud(impl, q.device, geometry.seq_len)
    if impl != "auto":
        return impl
    q, k, v = map(_random_like, (q, k, v))
    if attn_mask is not None:
        attn_mask = torch.ones(attn_mask.shape, dtype=attn_mask.dtype, device=q.device)
    scale = q.shape[-1] ** -0.5
    arguments = (q, k, v, attn_mask, intervals, log_weights, geometry, scale)
    names = _candidates(q, geometry)
    if q.device.type != "cpu":
        return _fastest("forward", arguments, names, lambda name: run(name, arguments), True)
    calls = cache(partial(_attention_calls, arguments=arguments))
    return _fastest("inlined forward", arguments, names, lambda name: calls(name)(), True, AROUND)


def _attention_calls(name: str, arguments: Arguments) -> Callable[[], object]:
    """The dense calls that "masked" or "decomposed" makes, without what lies around them."""
    calls: list[Callable[[], tuple[Tensor, Tensor]]] = []

    def record(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(partial(dense.attend, *tensors, **options))
        return calls[-1]()

    (masked if name == "masked" else decomposed).forward(*arguments, record)
    return lambda: [call() for call in calls]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Run one implementation; an explicit choice never falls back to another.

    "auto" measures what can run the first time it sees a kind of call, and remembers the fastest.
    Where it must not measure (while a CUDA graph is recorded), and where ``impl`` is "static", a
    rule of thumb decides.

    Raises:
        UnsupportedInputError: if the implementation cannot run on these tensors.
    """
    arguments = (q, k, v, attn_mask, intervals, log_weights, geometry, scale)
    return run(choose(impl, arguments), arguments)


def choose(impl: str, arguments: Arguments, attend: Callable[[str], object] | None = None) -> str:
    """The implementation that :func:`forward` runs for these arguments of it.

    Args:
        impl: one of ``IMPLEMENTATIONS``.
        arguments: of :func:`forward`, without ``impl``.
        attend: runs one by its name, where that is another way than :func:`run`.

    Returns:
        One of ``IMPLEMENTATIONS``, never "static" or "auto".
    """
    q, geometry = arguments[0], arguments[6]
    impl = _resolve_aloud(impl, q.device, geometry.seq_len)
    if impl != "auto":
        return impl
    names = _candidates(q, geometry)
    if attend is not None:
        return _fastest("short forward", arguments, names, attend)
    return _fastest("forward", arguments, names, lambda name: run(name, arguments))


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: "triton" by its own kernels, every other one by the decomposition.

    "auto" measures the two, where both can run, whatever it chose for the forward pass.

    Raises:
        MaskError: if there is no such implementation.
        UnsupportedInputError: if it cannot run on these tensors.
    """
    if impl == "sage":
        raise UnsupportedInputError(
            "expected no gradients for impl='sage', which has none; use impl='auto' or no_grad()"
        )
    arguments = (q, k, v, attn_mask, intervals, log_weights, geometry, scale)

    def gradients(name: str) -> tuple[Tensor, Tensor, Tensor]:
        if name == "triton":
            from evdit_opt.kernels import triton_backward

            return triton_backward.backward(grad_out, q, k, v, out, lse, *arguments[3:])
        return decomposed_backward.backward(grad_out, q, k, v, out, lse, *arguments[3:])

    impl = _resolve_aloud(impl, q.device, geometry.seq_len)
    if impl == "auto":
        names = tuple(name for name in _candidates(q, geometry) if name != "masked")
        impl = _fastest("backward", arguments, names, gradients)
    return gradients(impl)


def _random_like(x: Tensor) -> Tensor:
    """Random numbers in the strides of ``x``, which may overlap."""
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    numbers = torch.randn(size, dtype=x.dtype, device=x.device)
    return numbers.as_strided(x.shape, x.stride())


def _require_name(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise MaskError(f"expected impl to be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def run(impl: str, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Run an implementation, one of ``IMPLEMENTATIONS`` but "static" and "auto"."""
    if impl == "reference":
        return reference.forward(*arguments)
    if impl == "masked":
        return masked.forward(*arguments)
    if impl == "sage":
        return decomposed.forward(*arguments, sage.attend)
    if impl == "triton":
        from evdit_opt.kernels import triton_forward

        return triton_forward.forward(*arguments)
    if impl in ("flex", "flex_flash"):
        from evdit_opt.kernels import flex

        return flex.forward(*arguments, "AUTO" if impl == "flex" else "FLASH")
    return decomposed.forward(*arguments)


def _fastest(
    direction: str,
    arguments: Arguments,
    names: tuple[str, ...],
    run: Callable[[str], object],
    is_random: bool = False,
    tie: float = autotune.TIE,
) -> str:
    """The fastest of ``names``, known or measured; by rule of thumb where that is forbidden.

    ``is_random``: the numbers are made up, so a compiler may be at work. ``tie``: as of
    :func:`autotune.choose`.
    """
    if len(names) == 1:
        return names[0]
    q, geometry = arguments[0], arguments[6]
    key = (("direction", direction), *_kind(arguments))
    choice = autotune.remembered(key, names)
    if choice is None:
        if not (is_random or _may_measure(q)):
            return resolve("static", q.device, geometry.seq_len)
        calls: dict[str, Callable[[], object]] = {
            name: partial(_candidate, run, name) for name in names
        }
        choice = autotune.choose(key, calls, q.device, tie)
    return choice.name


def _candidates(q: Tensor, geometry: Geometry) -> tuple[str, ...]:
    """What "auto" chooses from, all of it exact; the first of those as fast as each other."""
    is_short = geometry.seq_len <= SHORT_SEQ
    # On a CPU the one masked call of a short eager call needs the least Python (short_calls.py).
    names = ["masked"] if is_short and q.device.type == "cpu" else []
    names.append("decomposed")
    if q.device.type == "cuda" and _has_triton():
        try:
            check("triton", q, geometry)
            names.append("triton")
        except UnsupportedInputError:
            pass
    if is_short and "masked" not in names:
        names.append("masked")
    return tuple(names)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _candidate(run: Callable[[str], object], name: str) -> object:
    """One run to be measured; what Triton cannot compile becomes the error autotune knows."""
    if name != "triton":
        return run(name)
    from triton.errors import TritonError

    try:
        return run(name)
    except TritonError as error:
        raise RuntimeError(str(error)) from error


def _may_measure(q: Tensor) -> bool:
    """Only with real data, and where waiting for the device is allowed."""
    if torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        return False
    if q.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return q.device.type != "meta"


def _kind(arguments: Arguments) -> autotune.Key:
    """What calls have in common that share a choice."""
    q, k, v, attn_mask, intervals, log_weights, geometry, _ = arguments
    return (
        ("device", _device_name(q.device)),
        ("threads", torch.get_num_threads() if q.device.type == "cpu" else 0),
        ("dtype", str(q.dtype).removeprefix("torch.")),
        ("batch", q.shape[0]),
        ("heads", q.shape[1]),
        ("kv_heads", k.shape[1]),
        ("head_dim", q.shape[3]),
        ("frames", geometry.frames),
        ("tokens", geometry.tokens),
        ("text", geometry.prefix + geometry.suffix > 0),
        ("density", _density_bucket(intervals, geometry.frames)),
        ("weighted", any(log_weights)),
        ("padding", attn_mask is not None),
        ("dense", _dense_kernel(q, k, attn_mask is not None)),
        ("heads_outside", q.stride(1) > q.stride(2)),
        ("grad", q.requires_grad or k.requires_grad or v.requires_grad),
    )


def _dense_kernel(q: Tensor, k: Tensor, has_bias: bool) -> str:
    """What "decomposed" stands on: PyTorch's switches decide, and may be others tomorrow."""
    kernel = dense_cuda.choose(q, k, has_bias)
    return " ".join(filter(None, (kernel, current_flash_attention_impl()))) or "other"


@lru_cache(maxsize=256)
def _density_bucket(intervals: tuple[int, ...], frames: int) -> float:
    """Kept share of tiles, rounded."""
    kept = sum(intervals[2::3]) - sum(intervals[1::3])
    return round(DENSITY_BUCKETS * kept / frames**2) / DENSITY_BUCKETS


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
