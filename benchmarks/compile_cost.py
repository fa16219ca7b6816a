"""What it costs to compile an optimized model, against torch.compile of the dense one.

    python -m benchmarks.compile_cost [--rounds 3]

Every measurement is a process of its own. Cold: an empty Inductor cache. Warm: the same one again.
Counted is the CPU time of the first call, of that process and of the C++ compilers it starts
(Inductor compiles in the process itself, on one thread), less that of a second call: on a busy
machine the clock on the wall says little. Importing, loading and making a plan are not counted.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Rows, device_folder, environment
from evdit_opt import apply_plan
from evdit_opt.demo.tinywan import LATENT_SHAPE, load_tinywan
from evdit_opt.grid import VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.models import config_hash
from evdit_opt.passes.grid_source import GridSource
from evdit_opt.plan import CalibrationRecord, Plan, SiteLayout, SitePlan

ROOT = Path(__file__).parents[1]
WAYS = ("dense", "optimized")
RULES = (Rule(1), Rule(2), Rule(2, weighting="balanced"), Rule(3))
LAYERS = 8
BAR = 1.25
"""Cold compile of the optimized model, at most this many times that of the dense one."""


def tinywan() -> tuple[nn.Module, dict[str, Any], Plan]:
    """The demo's model, 6 layers of 3 heads x 32, 17 frames of 100 tokens."""
    call = {
        "hidden_states": torch.randn(1, *LATENT_SHAPE),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, 64),
        "return_dict": False,
    }
    model = load_tinywan().transformer
    grid = VideoGrid(17, 10, 10)
    return model, call, plan_of(model, "blocks.{}.attn1", grid, (2, 3, 4), 0, layers=6)


def wan() -> tuple[nn.Module, dict[str, Any], Plan]:
    """Wan's architecture, 8 layers of 4 heads x 32, 9 frames of 192 tokens."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=512, num_layers=LAYERS, rope_max_seq_len=64,
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 16, 9, 24, 32),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "return_dict": False,
    }
    return model, call, plan_of(model, "blocks.{}.attn1", VideoGrid(9, 12, 16), (2, 3, 4), 0)


def cogvideox() -> tuple[nn.Module, dict[str, Any], Plan]:
    """CogVideoX's architecture, 8 layers of 4 heads x 32, text before 9 frames of 192 tokens."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16,
        text_embed_dim=64, time_embed_dim=64, num_layers=LAYERS, sample_width=32,
        sample_height=24, sample_frames=33, max_text_seq_length=32,
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 9, 16, 24, 32),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "return_dict": False,
    }
    name = "transformer_blocks.{}.attn1"
    return model, call, plan_of(model, name, VideoGrid(9, 12, 16), (1, 3, 4), 32)


CASES = {"tinywan": tinywan, "wan": wan, "cogvideox": cogvideox}


def plan_of(
    model: nn.Module,
    name: str,
    grid: VideoGrid,
    dims: tuple[int, int, int],
    prefix: int,
    layers: int = LAYERS,
) -> Plan:
    """Four rules in turn, not calibrated; no reuse, which has a graph per mode of a step."""
    sites = tuple(
        SitePlan(
            name=name.format(n), rule=rule, reason="a benchmark",
            density=rule.mask(grid.frames).density, layout=SiteLayout(prefix=prefix),
        )
        for n, rule in ((n, RULES[n % len(RULES)]) for n in range(layers))
    )  # fmt: skip
    return Plan(
        model_class=type(model).__name__,
        model_config_hash=config_hash(model),
        sites=sites,
        grid=grid,
        grid_source=GridSource(kind="patch", input="hidden_states", patch=(1, 2, 2), dims=dims),
        min_tokens=0,
        fullgraph=True,
        calibration=CalibrationRecord(
            prompts_hash="none", prompt_count=1, steps=1, seed=0, threshold=0.1
        ),
    )


def cpu_seconds() -> float:
    """CPU time of this process and of those it waited for, in seconds."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def compile_once(case: str, way: str) -> dict[str, float]:
    """Compile one model in this process, and say what that took."""
    from torch._dynamo.utils import compilation_time_metrics
    from torch._inductor import compile_fx, metrics  # noqa: F401  torch.compile imports the first

    torch.manual_seed(0)
    model, call, plan = CASES[case]()
    model.eval()
    if way == "optimized":
        apply_plan(model, plan)
    else:
        model.compile(dynamic=False)
    with torch.no_grad():
        start = cpu_seconds()
        model(**call)
        first = cpu_seconds() - start
        start = cpu_seconds()
        model(**call)
        second = cpu_seconds() - start
    phases = {name: round(sum(times), 3) for name, times in compilation_time_metrics.items()}
    return {"cpu_s": first - second, "kernels": metrics.generated_kernel_count, "phases": phases}


def in_a_process(case: str, way: str, cache: str) -> dict[str, Any]:
    """:func:`compile_once` in a process that sees only the given Inductor cache."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.compile_cost", "--one", case, way]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def cold_and_warm(case: str, way: str) -> dict[str, dict[str, Any]]:
    """Two processes, one after the other, that share a cache nobody used before."""
    with tempfile.TemporaryDirectory() as cache:
        return {start: in_a_process(case, way, cache) for start in ("cold", "warm")}


def measure(case: str, rounds: int) -> dict[str, Any]:
    """A row: CPU seconds, cold and warm, dense and optimized side by side, and their ratios."""
    seen: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        with ThreadPoolExecutor() as both:  # side by side: what else the machine does, both meet
            for way, runs in zip(WAYS, both.map(partial(cold_and_warm, case), WAYS), strict=True):
                for start, run in runs.items():
                    seen.setdefault(f"{way}_{start}", []).append(run)
    row: dict[str, Any] = {
        f"{name}_cpu_s": statistics.median(found["cpu_s"] for found in runs)
        for name, runs in seen.items()
    }
    for start in ("cold", "warm"):
        row[f"{start}_ratio"] = statistics.median(
            optimized["cpu_s"] / dense["cpu_s"]
            for optimized, dense in zip(
                seen[f"optimized_{start}"], seen[f"dense_{start}"], strict=True
            )
        )
    row["kernels"] = {way: seen[f"{way}_cold"][0]["kernels"] for way in WAYS}
    row["rounds"] = rounds
    row["meets_bar"] = row["cold_ratio"] <= BAR
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--one", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(compile_once(*arguments.one)))
        return
    folder = ROOT / "benchmarks/results" / device_folder("cpu")
    facts: Mapping[str, Any] = {
        **environment("cpu"), "unit": "CPU seconds of a process and its compilers"
    }  # fmt: skip
    rows = Rows(folder / "compile_cost.json", facts)
    for case in arguments.cases:
        rows.add(case, measure(case, arguments.rounds))
        print(case, json.dumps(rows[case]))


if __name__ == "__main__":
    main()
