"""Tile attention against dense attention, masked dense attention and FlexAttention, on a CPU.

    python -m benchmarks.bench_tile_attention --threads 1 --clock thread
    python -m benchmarks.bench_tile_attention --threads 2 --section main --section demo

(``benchmarks.gpu_suite`` is for GPUs.) FLOPs of one forward: 4 * batch * heads * head_dim * (kept
query-key pairs); dense keeps seq ** 2. Every contender runs once per round, so that what disturbs
the machine disturbs all of them alike. ``of ideal`` is time / (density * dense time): 1 is perfect.
On a shared machine use one thread and its CPU time; the JSON records which clock was used, and
keeps what was measured with another number of threads. ``--part 2/3`` measures a third of the rows,
where the machine can be had alone for a short time only.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import cpu_memory
from benchmarks.contenders import compiled_ours, flex, make_inputs, ours
from benchmarks.measure import CLOCKS, environment, interleaved
from benchmarks.shapes import SMALL, Shape
from evdit_opt.masks import Rule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Contenders = dict[str, Callable[[], object]]
COMPILED_SEQ = 256
# Of a short call more are timed.
ROUNDS = 25
MAIN = Shape(
    name="main", frames=16, tokens=576, heads=4, head_dim=64,
    rules=(Rule(1), Rule(2), Rule(2, weighting="balanced")),
)  # fmt: skip
WIDE = Shape(
    name="wide", frames=8, tokens=900, heads=2, head_dim=128, rules=(Rule(1), Rule(2)),
)  # fmt: skip
DEMO = Shape(
    name="demo", frames=17, tokens=100, heads=3, head_dim=32,
    rules=tuple(Rule(k, weighting=w) for k in (2, 3, 4, 6) for w in ("none", "balanced")),
)  # fmt: skip


def bench(
    arguments: argparse.Namespace, shape: Shape, dtype: str, rule: Rule, peers: bool
) -> dict[str, Any]:
    """One shape and one rule."""
    q, k, v = make_inputs(shape, DTYPES[dtype], "cpu")
    mask = rule.mask(shape.frames)
    contenders: Contenders = {
        "dense": lambda: scaled_dot_product_attention(q, k, v),
        "decomposed": partial(ours(shape, mask, "decomposed"), q, k, v),
    }
    if peers:
        contenders["flex"] = partial(flex(shape, mask, "cpu", {}), q, k, v)
    seconds = interleaved(contenders, arguments.rounds, "cpu", arguments.clock)
    dense = seconds["dense"]
    results = {}
    for name, own in seconds.items():
        density = 1.0 if name == "dense" else mask.density
        results[name] = {
            "median_ms": 1e3 * statistics.median(own),
            "min_ms": 1e3 * min(own),
            "of_dense": min(own) / min(dense),
            "of_ideal": min(own) / min(dense) / density,
            "of_ideal_median": statistics.median(own) / statistics.median(dense) / density,
            "gflops_kept": shape.dense_flops() * density / min(own) / 1e9,
        }
    row = {"frames": shape.frames, "tokens": shape.tokens, "heads": shape.heads,
           "head_dim": shape.head_dim, "dtype": dtype, "rule": rule.describe(shape.frames),
           "density": mask.density, "results": results}  # fmt: skip
    ratios = ", ".join(f"{n} {r['of_ideal']:.2f}" for n, r in results.items() if n != "dense")
    print(f"F={shape.frames} T={shape.tokens} H={shape.heads} D={shape.head_dim} {dtype} "
          f"{row['rule']}: density {mask.density:.3f}, dense {results['dense']['min_ms']:.1f} ms; "
          f"of ideal: {ratios}", flush=True)  # fmt: skip
    return row


def small(arguments: argparse.Namespace, shape: Shape, dtype: str, rule: Rule) -> dict[str, Any]:
    """Whether "auto" is as fast as the best there is where calls are short.

    "masked SDPA" is what a person would write: one call, its mask made before. Up to
    ``COMPILED_SEQ`` tokens, where calling an operator costs as much as what it does, also compiled.
    """
    q, k, v = make_inputs(shape, DTYPES[dtype], "cpu")
    mask = rule.mask(shape.frames)
    expanded = mask.expand(shape.layout).to(q.dtype)
    contenders: Contenders = {
        impl: partial(ours(shape, mask, impl), q, k, v) for impl in ("auto", "decomposed", "masked")
    }
    contenders["masked SDPA"] = lambda: scaled_dot_product_attention(q, k, v, attn_mask=expanded)
    if shape.layout.seq_len <= COMPILED_SEQ:
        torch._dynamo.reset()
        contenders["auto compiled"] = partial(compiled_ours(shape, mask), q, k, v)
        contenders["masked SDPA compiled"] = torch.compile(
            contenders["masked SDPA"], fullgraph=True, dynamic=False
        )
    contenders["auto"]()  # measures and chooses
    seconds = interleaved(contenders, ROUNDS * arguments.rounds, "cpu", arguments.clock)
    times = {name: 1e3 * min(own) for name, own in seconds.items()}
    own = min(times["decomposed"], times["masked"])
    row = {"frames": shape.frames, "tokens": shape.tokens, "heads": shape.heads,
           "head_dim": shape.head_dim, "dtype": dtype, "rule": rule.describe(shape.frames),
           "density": mask.density, "min_ms": times,
           "auto_over_own": times["auto"] / own}  # fmt: skip
    text = ", ".join(f"{name} {time:.3f}" for name, time in times.items())
    print(f"F={shape.frames} T={shape.tokens} {dtype} {row['rule']}: {text} ms; auto / best "
          f"implementation {row['auto_over_own']:.2f}", flush=True)  # fmt: skip
    return row


def memory(dtype: str, rule: int) -> dict[str, Any]:
    """Bytes at the peak of one call, each in a process of its own."""
    dense, own = (cpu_memory.peak(name, rule, dtype) for name in ("dense", "decomposed"))
    shape, beside = cpu_memory.MEMORY, {"dense": dense["beside"], "decomposed": own["beside"]}
    row = {"frames": shape.frames, "tokens": shape.tokens, "heads": shape.heads,
           "head_dim": shape.head_dim, "dtype": dtype,
           "rule": shape.rules[rule].describe(shape.frames), "inputs_bytes": dense["inputs"],
           "beside_inputs_bytes": beside,
           "of_dense": sum(own.values()) / sum(dense.values())}  # fmt: skip
    print(f"{dtype} {row['rule']}: {beside} beside {dense['inputs']} bytes; "
          f"{row['of_dense']:.2f} of dense", flush=True)  # fmt: skip
    return row


def exponent(arguments: argparse.Namespace, references: int) -> dict[str, Any]:
    """Least squares slope of log(time) over log(frames) at one rule: 1 is linear, dense is 2."""
    frames = (8, 12, 16, 24, 32)
    calls: Contenders = {}
    for count in frames:
        shape = Shape(name="growth", frames=count, tokens=256, heads=4, head_dim=64, rules=())
        attention = ours(shape, Rule(references).mask(count), "decomposed")
        calls[str(count)] = partial(attention, *make_inputs(shape, torch.float32, "cpu"))
    seconds = interleaved(calls, arguments.rounds, "cpu", arguments.clock)
    times = [1e3 * min(own) for own in seconds.values()]
    x, y = torch.tensor(frames).double().log(), torch.tensor(times).double().log()
    slope = (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()
    print(f"references {references}: time grows as frames ** {slope:.3f}", flush=True)
    return {"references": references, "tokens": 256, "frames": frames, "min_ms": times,
            "exponent": slope}  # fmt: skip


Rows = list[Callable[[], dict[str, Any]]]
SECTIONS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "main": lambda a: [
        partial(bench, a, shape, dtype, rule, not a.no_peers)
        for dtype in ("float32", "bfloat16") for shape in (MAIN, WIDE) for rule in shape.rules
    ],
    "demo": lambda a: [partial(bench, a, DEMO, "float32", rule, False) for rule in DEMO.rules],
    "growth": lambda a: [partial(exponent, a, references) for references in (1, 2)],
    "small": lambda a: [
        partial(small, a, shape, dtype, rule)
        for dtype in ("float32", "bfloat16") for shape in SMALL for rule in shape.rules
    ],
    "memory": lambda a: [
        partial(memory, dtype, rule)
        for dtype in ("float32", "bfloat16") for rule in range(len(cpu_memory.MEMORY.rules))
    ],
}  # fmt: skip


def part_of(text: str, rows: int) -> range:
    """Which of ``rows`` rows are part "2/3" of a section."""
    part, parts = map(int, text.split("/"))
    return range((part - 1) * rows // parts, part * rows // parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="default: all")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/cpu/tile_attention.json")
    )
    parser.add_argument("--no-peers", action="store_true", help="only dense and decomposed")
    parser.add_argument(
        "--part", default="1/1", help="2/3: the second third of every section; the other rows stay"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {}
    if arguments.output.exists():  # sections that are not measured now stay
        report = json.loads(arguments.output.read_text(encoding="utf-8"))
    facts = environment("cpu") | {
        "threads": arguments.threads, "clock": arguments.clock, "rounds": arguments.rounds,
    }  # fmt: skip
    with torch.no_grad():
        for section in arguments.section or SECTIONS:
            name = section if arguments.threads == 1 else f"{section}, {arguments.threads} threads"
            cases = SECTIONS[section](arguments)
            old = report.get(name, {}).get("rows", [])
            if len(old) != len(cases) and arguments.part != "1/1":
                parser.error(f"expected all rows of {name!r} in {arguments.output}; measure them")
            rows = old if len(old) == len(cases) else [{} for _ in cases]
            for index in part_of(arguments.part, len(cases)):
                rows[index] = {**cases[index](), "commit": facts["commit"]}
            report[name] = {"environment": facts, "rows": rows}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
