"""Tile attention against dense attention, masked dense attention and FlexAttention.

    python benchmarks/bench_tile_attention.py --threads 1 --clock thread

FLOPs of one forward: 4 * batch * heads * head_dim * (kept query-key pairs); dense keeps seq ** 2.
Every contender runs once per round, so that what disturbs the machine disturbs all of them alike.
``of ideal`` is time / (density * dense time): 1 is perfect, the goal is 1.10. On a shared machine
use one thread and its CPU time; the JSON records which clock was used.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import DROPPED, Rule, TileMask

CLOCKS = {"thread": time.thread_time, "process": time.process_time, "wall": time.perf_counter}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Contenders = dict[str, Callable[[], object]]


def flex(q: Tensor, k: Tensor, v: Tensor, mask: TileMask, tokens: int) -> Callable[[], object]:
    """Compiled FlexAttention with a BlockMask of the kept tiles; weights as a score_mod."""
    bias = mask.bias.to(q.device)
    kept = bias != DROPPED
    seq = q.shape[2]
    blocks = create_block_mask(
        lambda b, h, i, j: kept[i // tokens, j // tokens], None, None, seq, seq, device=q.device
    )
    weighted = bool((bias[kept] != 0).any())

    def weight(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[i // tokens, j // tokens]

    compiled = torch.compile(flex_attention, fullgraph=True)
    return lambda: compiled(q, k, v, block_mask=blocks, score_mod=weight if weighted else None)


def measure(contenders: Contenders, rounds: int, clock: str, device: str) -> dict[str, list[float]]:
    """Seconds of every contender in every round, after one round to warm up."""
    now = CLOCKS[clock]

    def finished() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return now()

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for n in range(rounds + 1):
        for name, run in contenders.items():
            start = finished()
            run()
            if n:
                times[name].append(finished() - start)
    return times


def bench(
    arguments: argparse.Namespace, frames: int, tokens: int, heads: int, head_dim: int,
    dtype: str, rule: Rule, peers: bool,
) -> dict[str, object]:  # fmt: skip
    """One shape and one rule."""
    torch.manual_seed(0)
    layout = TokenLayout(VideoGrid(frames, tokens, 1))
    q, k, v = (
        torch.randn(1, layout.seq_len, heads, head_dim, device=arguments.device)
        .to(DTYPES[dtype]).transpose(1, 2) for _ in range(3)
    )  # fmt: skip
    mask = rule.mask(frames)
    contenders: Contenders = {
        "dense": lambda: scaled_dot_product_attention(q, k, v),
        "decomposed": lambda: tile_attention(q, k, v, mask, layout, impl="decomposed"),
    }
    if peers:
        expanded = mask.expand(layout).to(arguments.device, q.dtype)
        keep = expanded != DROPPED
        contenders["float mask"] = lambda: scaled_dot_product_attention(q, k, v, attn_mask=expanded)
        contenders["bool mask"] = lambda: scaled_dot_product_attention(q, k, v, attn_mask=keep)
        contenders["flex"] = flex(q, k, v, mask, tokens)
    if arguments.device == "cuda":
        contenders["triton"] = lambda: tile_attention(q, k, v, mask, layout, impl="triton")
    seconds = measure(contenders, arguments.rounds, arguments.clock, arguments.device)
    dense = seconds["dense"]
    flops = 4 * heads * head_dim * layout.seq_len**2
    results = {}
    for name, own in seconds.items():
        density = 1.0 if name == "dense" else mask.density
        results[name] = {
            "median_ms": 1e3 * statistics.median(own),
            "min_ms": 1e3 * min(own),
            "of_dense": min(own) / min(dense),
            "of_ideal": min(own) / min(dense) / density,
            "of_ideal_median": statistics.median(own) / statistics.median(dense) / density,
            "gflops_kept": flops * density / min(own) / 1e9,
        }
    row = {"frames": frames, "tokens": tokens, "heads": heads, "head_dim": head_dim,
           "dtype": dtype, "rule": rule.describe(frames), "density": mask.density,
           "results": results}  # fmt: skip
    ratios = ", ".join(f"{n} {r['of_ideal']:.2f}" for n, r in results.items() if n != "dense")
    print(f"F={frames} T={tokens} H={heads} D={head_dim} {dtype} {row['rule']}: "
          f"density {mask.density:.3f}, dense {results['dense']['min_ms']:.1f} ms; "
          f"of ideal: {ratios}", flush=True)  # fmt: skip
    return row


def exponent(arguments: argparse.Namespace, references: int) -> dict[str, object]:
    """Least squares slope of log(time) over log(frames) at one rule: 1 is linear, dense is 2."""
    frames, tokens, heads, head_dim = (8, 12, 16, 24, 32), 256, 4, 64
    calls: Contenders = {}
    for count in frames:
        layout = TokenLayout(VideoGrid(count, tokens, 1))
        q, k, v = (
            torch.randn(1, layout.seq_len, heads, head_dim, device=arguments.device)
            .transpose(1, 2) for _ in range(3)
        )  # fmt: skip
        call = partial(tile_attention, q, k, v, Rule(references).mask(count), layout)
        calls[str(count)] = partial(call, impl="decomposed")
    seconds = measure(calls, arguments.rounds, arguments.clock, arguments.device)
    times = [1e3 * min(own) for own in seconds.values()]
    x, y = torch.tensor(frames).double().log(), torch.tensor(times).double().log()
    slope = (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()
    print(f"references {references}: time grows as frames ** {slope:.3f}", flush=True)
    return {"references": references, "tokens": tokens, "frames": frames, "min_ms": times,
            "exponent": slope}  # fmt: skip


def environment(arguments: argparse.Namespace) -> dict[str, object]:
    """Where and when the numbers came from."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    on_cuda = arguments.device == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else torch.backends.cpu.get_cpu_capability()
    return {"device": arguments.device, "device_name": f"{platform.machine()} {name}",
            "threads": arguments.threads, "clock": arguments.clock, "rounds": arguments.rounds,
            "torch": torch.__version__, "python": platform.python_version(), "commit": commit,
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--no-peers", action="store_true", help="only dense and decomposed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    default = Path("benchmarks/results") / arguments.device / "tile_attention.json"
    output = arguments.output or default
    peers = not arguments.no_peers

    report: dict[str, object] = {"environment": environment(arguments)}
    with torch.no_grad():
        report["main"] = [
            bench(arguments, 16, 576, 4, 64, dtype, Rule(references, 0, weighting), peers)
            for dtype in ("float32", "bfloat16")
            for references, weighting in ((1, "none"), (2, "none"), (2, "balanced"))
        ]
        report["demo"] = [
            bench(arguments, 17, 100, 3, 32, "float32", Rule(references, 0, weighting), False)
            for references in (2, 3, 4, 6)
            for weighting in ("none", "balanced")
        ]
        report["growth"] = [exponent(arguments, references) for references in (1, 2)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
