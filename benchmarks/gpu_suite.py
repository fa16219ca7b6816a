"""Everything about the attention operator that only a GPU can say, in one call.

    python -m benchmarks.gpu_suite --budget-seconds 540
    python -m benchmarks.gpu_suite --part forward --part backward

Every finished row is in benchmarks/results/<device>/gpu_suite.json before the next one begins; rows
that are there already are skipped, so a call that was cut short is continued by the same call. The
parts, and the shapes within them, come in the order of their importance. What fails is told and
left out, the rest is measured, and the call ends with exit code 1. Then
``python benchmarks/performance_table.py`` writes docs/performance.md.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import contenders, video_dit
from benchmarks.measure import Rows, device_folder, environment, interleaved, peak_bytes
from benchmarks.sampled_error import sampled_errors
from benchmarks.shapes import MODELS, TINY, Shape
from benchmarks.suite import Suite
from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.kernels import autotune, tile_attention
from evdit_opt.masks import Rule, TileMask

ROOT = Path(__file__).parents[1]
# A dense backend this many times as slow as the fastest in its first round is not run again.
GIVE_UP = 1.5
# Compiling a kernel takes a test longer than running it: several processes share the GPU.
TEST_PROCESSES = 8


def fused(suite: Suite) -> bool:
    """Whether Triton's kernels run: on a GPU, or tiny shapes in its interpreter."""
    if suite.device == "cuda":
        return True
    from evdit_opt.kernels.triton_launch import is_interpreted

    return suite.tiny and is_interpreted()


def implementations(suite: Suite) -> tuple[str, ...]:
    """Implementations that are timed and judged."""
    return ("decomposed", "triton") if fused(suite) else ("decomposed",)


def attention_rows(suite: Suite, shape: Shape, backward: bool) -> None:
    """All masks of a shape, in the same rounds as dense attention by every backend."""
    kind = "backward" if backward else "forward"
    inputs = contenders.make_inputs(shape, suite.dtype, suite.device)
    grad = torch.randn_like(inputs[0]) if backward else None
    dense, cannot = contenders.dense_backends(inputs)
    attentions: dict[str, contenders.Attention] = dict(dense)
    masks = shape.masks()
    for name, mask in masks.items():
        for impl in implementations(suite):
            attentions[f"{name} {impl}"] = contenders.ours(shape, mask, impl)
        if suite.device == "cuda":  # on a CPU it has no backward, and its compiler takes seconds
            flex = contenders.flex(shape, mask, suite.device, suite.compiled)
            attentions[f"{name} flex"] = flex
    calls, failed = {}, dict(cannot)
    for name, attention in attentions.items():
        call = contenders.timed(attention, inputs, grad)
        try:
            call()
            calls[name] = call
        except Exception as error:  # Triton's and Dynamo's own errors have no base in common
            failed[name] = first_line(error)
            suite.failed.append(f"{kind}/{shape.name}/{name}")
    baselines = {name: call for name, call in calls.items() if name in dense}
    first = interleaved(baselines, 1, suite.device)
    best = min(times[0] for times in first.values())
    slow = [name for name, times in first.items() if times[0] > GIVE_UP * best]
    seconds = interleaved(
        {name: call for name, call in calls.items() if name not in slow},
        suite.rounds, suite.device,
    )  # fmt: skip
    seconds |= {name: first[name] for name in slow}
    for name, mask in masks.items():
        own = {
            key.removeprefix(f"{name} "): times
            for key, times in seconds.items() if key.startswith(f"{name} ") or key in dense
        }  # fmt: skip
        able = [impl for impl in implementations(suite) if f"{name} {impl}" in calls]
        errors = judge(able, shape, mask, inputs, grad)
        row = attention_row(shape, mask, own, backward)
        why = {key: text for key, text in failed.items() if key.startswith((f"{name} ", "dense"))}
        suite.rows.add(f"{kind}/{shape.name}/{name}", {**row, "errors": errors, "cannot": why})


def attention_row(
    shape: Shape, mask: TileMask, seconds: dict[str, list[float]], backward: bool
) -> dict[str, Any]:
    """Numbers of one mask: times, rates on kept tiles, and speedups over the fastest dense."""
    density = mask.token_density(shape.layout)
    best = {name: median(times) for name, times in seconds.items()}
    dense = {name: time_ for name, time_ in best.items() if name.startswith("dense")}
    fastest = min(dense, key=lambda name: dense[name])
    # The backward pass has five matrix products where the forward pass has two.
    flops = shape.dense_flops() * (3.5 if backward else 1.0)
    results = {}
    for name, time_ in best.items():
        share = 1.0 if name in dense else density
        results[name] = {
            "ms": 1e3 * time_,
            "min_ms": 1e3 * min(seconds[name]),
            "rounds": len(seconds[name]),
            "tflops_kept": flops * share / time_ / 1e12,
        }
        if name not in dense:
            results[name]["speedup"] = dense[fastest] / time_
            results[name]["of_ideal"] = dense[fastest] / time_ * density
            if "flex" in best:
                results[name]["over_flex"] = best["flex"] / time_
    return {
        "shape": {"frames": shape.frames, "tokens": shape.tokens, "heads": shape.heads,
                  "head_dim": shape.head_dim, "prefix": shape.prefix, "suffix": shape.suffix},
        "density": density, "ideal": 1.0 / density, "fastest_dense": fastest, "results": results,
    }  # fmt: skip


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def judge(
    able: list[str],
    shape: Shape,
    mask: TileMask,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad: torch.Tensor | None,
) -> dict[str, dict[str, float]]:
    """Largest errors of implementations against float64, on sampled rows."""
    errors = {}
    for impl in able:
        leaves = [x.detach().requires_grad_(grad is not None) for x in inputs]
        out, lse = tile_attention(*leaves, mask, shape.layout, impl=impl, return_lse=True)
        grads = None if grad is None else torch.autograd.grad(out, leaves, grad)
        errors[impl] = sampled_errors(
            *inputs, mask, shape.layout, out.detach(), grads, grad, lse.detach()
        )
    return errors


def part_tests(suite: Suite) -> None:
    """The tests marked gpu, in a process of their own."""
    if not suite.due(["tests"]):
        return

    def run() -> None:
        marker = "gpu" if suite.device == "cuda" else "gpu and not gpu"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider",
                   "--maxfail=20", "tests/kernels"]  # fmt: skip
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
        limit = suite.budget - (time.monotonic() - suite.begin)
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired as error:  # what it holds are bytes, or None
            tail = (error.stdout or b"").decode(errors="replace")[-4000:]
            raise RuntimeError(f"the tests ran past {limit:.0f} s:\n{tail}") from None
        tail = (done.stdout + done.stderr)[-4000:]
        suite.rows.add("tests", {"exit_code": done.returncode, "tail": tail})

    suite.take_time("tests", run)


def part_attention(suite: Suite, backward: bool) -> None:
    kind = "backward" if backward else "forward"
    for shape in suite.shapes:
        if suite.due([f"{kind}/{shape.name}/{name}" for name in shape.masks()]):
            name = f"{kind}/{shape.name}"
            suite.take_time(name, partial(attention_rows, suite, shape, backward))


def part_memory(suite: Suite) -> None:
    """Peak memory beside the inputs, forward and with backward, against dense attention."""
    if suite.device != "cuda":
        return
    for shape in suite.shapes[:3]:
        name = f"memory/{shape.name}"
        if suite.due([name]):
            suite.take_time(name, partial(memory, suite, shape, name))


def memory(suite: Suite, shape: Shape, name: str) -> None:
    """The peaks of one shape under its first mask."""
    rule, mask = next(iter(shape.masks().items()))
    inputs = contenders.make_inputs(shape, suite.dtype, suite.device)
    grad = torch.randn_like(inputs[0])
    attentions = {"dense": torch.nn.functional.scaled_dot_product_attention} | {
        impl: contenders.ours(shape, mask, impl) for impl in implementations(suite)
    }
    peaks = {
        f"{who} {kind}": peak_bytes(contenders.timed(attention, inputs, given))
        for who, attention in attentions.items()
        for kind, given in (("forward", None), ("backward", grad))
    }
    suite.rows.add(name, {"rule": rule, "bytes": peaks})


def part_sweep(suite: Suite) -> None:
    """The fused kernels under every configuration worth timing: what their defaults should be."""
    if not fused(suite):
        return
    seen: set[int] = set()
    for shape in suite.shapes:
        name, mask = next(iter(shape.masks().items()))
        if shape.head_dim in seen:
            continue
        seen.add(shape.head_dim)
        for kernel in ("forward", "grad_q", "grad_kv"):
            row = f"sweep/{shape.name}/{kernel}"
            if suite.due([row]):
                suite.take_time(row, partial(sweep, suite, shape, name, mask, kernel))


def sweep(suite: Suite, shape: Shape, name: str, mask: TileMask, kernel: str) -> None:
    """One kernel: the forward pass, or the whole backward pass with only this kernel changed."""
    from evdit_opt.kernels import triton_backward, triton_forward
    from evdit_opt.kernels.geometry import Geometry
    from evdit_opt.kernels.triton_configs import LaunchConfig, candidates

    inputs = contenders.make_inputs(shape, suite.dtype, suite.device)
    geometry = Geometry(
        frames=shape.frames, tokens=shape.tokens, prefix=shape.prefix, suffix=shape.suffix
    )
    arguments = (None, *mask.segments(), geometry, shape.head_dim**-0.5)
    result = triton_forward.forward(*inputs, *arguments)
    grad = torch.randn_like(result[0])

    def call(config: LaunchConfig) -> object:
        if kernel == "forward":
            return triton_forward.forward(*inputs, *arguments, config)
        return triton_backward.backward(
            grad, *inputs, *result, *arguments, **{f"{kernel}_config": config}
        )

    capability = torch.cuda.get_device_capability() if suite.device == "cuda" else (9, 0)
    configs = candidates(kernel, capability, shape.head_dim, torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {}
    failed = {}
    for config in configs[:2] if suite.tiny else configs:
        text = (f"{config.block_m}x{config.block_n} warps {config.num_warps} stages "
                f"{config.num_stages}{' TMA' if config.use_tma else ''}")  # fmt: skip
        try:
            call(config)
            calls[text] = partial(call, config)
        except Exception as error:  # most often: not enough shared memory or registers
            failed[text] = first_line(error)
    seconds = interleaved(calls, suite.rounds, suite.device, give_up=GIVE_UP)
    times = {text: 1e3 * median(own) for text, own in seconds.items()}
    suite.rows.add(f"sweep/{shape.name}/{kernel}", {
        "rule": name, "default": next(iter(calls)), "cannot": failed,
        "ms": dict(sorted(times.items(), key=lambda item: item[1])),
    })  # fmt: skip


def part_step(suite: Suite) -> None:
    """A stack of transformer blocks, compiled dense and compiled with a plan."""
    if not suite.due(["step"]):
        return

    def run() -> None:
        torch.manual_seed(0)
        shape = TINY[1] if suite.tiny else MODELS[2]
        height, layers, rule = (3, 2, Rule(1)) if suite.tiny else (30, 4, Rule(2))
        model = video_dit.VideoDiT(shape.heads, shape.head_dim, layers)
        model = model.to(suite.device, suite.dtype).eval()
        x = video_dit.latents(shape, height, suite.dtype, suite.device)
        modes = ["default"] if suite.tiny else ["default", "reduce-overhead"]
        seconds: dict[str, dict[str, list[float]]] = {}
        sites: tuple[str, ...] = ()
        for mode in modes:
            sparse = video_dit.VideoDiT(shape.heads, shape.head_dim, layers)
            sparse = sparse.to(suite.device, suite.dtype).eval()
            sparse.load_state_dict(model.state_dict())
            graphs = {} if mode == "default" else {"triton.cudagraphs": True}
            inner = "inductor" if suite.device == "cuda" else "eager"
            apply_plan(sparse, video_dit.plan(sparse, shape, height, rule), inner=inner,
                       inductor_options=graphs)  # fmt: skip
            dense = (
                torch.compile(model, fullgraph=True, mode=mode) if inner == "inductor" else model
            )
            with torch.no_grad():
                seconds[mode] = interleaved(
                    {"dense": lambda: dense(x), "evdit": lambda: sparse(x)},  # noqa: B023
                    suite.rounds, suite.device,
                )  # fmt: skip
            sites = report(sparse).rewritten
            restore(sparse)
        suite.rows.add("step", {
            "layers": layers, "rule": rule.describe(shape.frames), "shape": shape.name,
            "density": rule.mask(shape.frames).density, "sites": len(sites),
            "ms": {mode: {name: 1e3 * median(times) for name, times in own.items()}
                   for mode, own in seconds.items()},
            "auto": [choice.describe() for choice in autotune.choices()],
        })  # fmt: skip

    suite.take_time("step", run)


PARTS: dict[str, Callable[[Suite], None]] = {
    "forward": lambda suite: part_attention(suite, backward=False),
    "backward": lambda suite: part_attention(suite, backward=True),
    "step": part_step,
    "tests": part_tests,
    "memory": part_memory,
    "sweep": part_sweep,
}


def show(rows: Rows) -> str:
    """The rows as a short table."""
    lines = []
    for name in rows.names():
        row = rows[name]
        if "results" in row:
            text = ", ".join(
                f"{who} {own['ms']:.2f} ms"
                + (f" x{own['speedup']:.2f}" if "speedup" in own else "")
                for who, own in row["results"].items()
            )
            cannot = "".join(f"; {who}: {why}" for who, why in row["cannot"].items())
            lines.append(f"{name}: ideal x{row['ideal']:.2f}; {text}{cannot}")
        else:
            facts = {key: value for key, value in row.items() if key not in ("commit", "date")}
            lines.append(f"{name}: {str(facts)[:400]}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Rows:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes: a dry run")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="of this repository, where there is no git")
    options = parser.parse_args(arguments)
    default = ROOT / "benchmarks" / "results" / device_folder(options.device) / "gpu_suite.json"
    suite = Suite(
        device=options.device,
        tiny=options.tiny,
        rows=Rows(options.output or default, environment(options.device, options.commit)),
        budget=options.budget_seconds,
        rounds=options.rounds,
    )
    for name in options.part or PARTS:
        print(f"{name} at {time.monotonic() - suite.begin:.0f} s", flush=True)
        PARTS[name](suite)
    print(show(suite.rows))
    print(f"rows are in {suite.rows.path}")
    if suite.failed:
        sys.exit(f"failed, see above: {', '.join(suite.failed)}")
    return suite.rows


if __name__ == "__main__":
    main()
