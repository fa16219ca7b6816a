"""The sparse ONNX model against the dense one of the same weights, in onnxruntime.

Three architectures of diffusers with random weights, at a length where attention is most of the
time; another rule at every site, each of density 0.4 at most. `write` exports every model dense and
sparse, in two operator sets, which spell attention differently, with what PyTorch computes.
`measure` compares onnxruntime with that, then runs all files of a model in turn, in one process.

    python benchmarks/onnx_speed.py write && python benchmarks/onnx_speed.py measure

The speedup is that of the fastest sparse file over the fastest dense one.
"""

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn

from benchmarks.measure import Rows, environment, interleaved
from evdit_opt import VideoGrid
from evdit_opt.apply import apply_plan, restore
from evdit_opt.export import export_program
from evdit_opt.export.to_onnx import write_onnx
from evdit_opt.masks import Rule
from evdit_opt.models import config_hash
from evdit_opt.passes.grid_source import GridSource
from evdit_opt.plan import CalibrationRecord, Plan, SiteLayout, SitePlan

GRID = VideoGrid(17, 16, 25)  # 17 frames of 400 tokens
HEADS, HEAD_DIM, TEXT = 2, 64, 64
RULES = (Rule(2, weighting="balanced"), Rule(1, window=1))
CLOSE = 1e-4  # largest relative error of float32, in the norm of the output
PAGE = Path(__file__).parents[1] / "docs/export.md"
OUTPUT = Path("benchmarks/results/cpu/onnx.json")


@dataclass(frozen=True)
class Model:
    """One architecture: its class in diffusers, config and call, and where its sites are."""

    kind: str
    config: dict[str, Any]
    call: dict[str, Any]
    sites: tuple[str, ...]
    patch: tuple[int, int, int] = (1, 2, 2)
    dims: tuple[int, int, int] = (2, 3, 4)
    prefix: int = 0
    suffix: int = 0

    def build(self) -> nn.Module:
        """The model with random weights, none of them zero."""
        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, self.kind)(**self.config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if float(parameter.abs().max()) == 0.0:
                    parameter.normal_(0, 0.2)
        return model

    def plan(self, model: nn.Module) -> Plan:
        """Another rule at every site."""
        sites = tuple(
            SitePlan(
                name=name,
                rule=RULES[n],
                reason="for timing",
                layout=SiteLayout(prefix=self.prefix, suffix=self.suffix),
                density=RULES[n].mask(GRID.frames).density,
            )
            for n, name in enumerate(self.sites)
        )
        return Plan(
            model_class=self.kind,
            model_config_hash=config_hash(model),
            sites=sites,
            grid=GRID,
            grid_source=GridSource(
                kind="patch", input="hidden_states", patch=self.patch, dims=self.dims
            ),
            min_tokens=0,
            fullgraph=True,
            calibration=CalibrationRecord(
                prompts_hash="random", prompt_count=1, steps=1, seed=0, threshold=0.0
            ),
        )


def models() -> dict[str, Model]:
    """Text beside the video (Wan), before it (CogVideoX), behind it and masked (HunyuanVideo)."""
    torch.manual_seed(1)
    frames, height, width = GRID.frames, 2 * GRID.height, 2 * GRID.width
    latents, text = torch.randn(1, 4, frames, height, width), torch.randn(1, TEXT, 32)
    heads = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
    common = {"in_channels": 4, "out_channels": 4, **heads}
    time = {"timestep": torch.tensor([300]), "return_dict": False}
    text_mask = torch.ones(1, TEXT, dtype=torch.bool)
    text_mask[:, TEXT - 9 :] = False
    wan = Model(
        "WanTransformer3DModel",
        {**common, "text_dim": 32, "freq_dim": 64, "ffn_dim": 512, "num_layers": 2},
        {"hidden_states": latents, "encoder_hidden_states": text, **time},
        ("blocks.0.attn1", "blocks.1.attn1"),
    )
    cogvideox = Model(
        "CogVideoXTransformer3DModel",
        {
            **common,
            "text_embed_dim": 32,
            "num_layers": 2,
            "sample_width": width,
            "sample_height": height,
            "sample_frames": 4 * frames - 3,
            "max_text_seq_length": TEXT,
        },
        {"hidden_states": latents.transpose(1, 2), "encoder_hidden_states": text, **time},
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        dims=(1, 3, 4),
        prefix=TEXT,
    )
    hunyuan = Model(
        "HunyuanVideoTransformer3DModel",
        {
            **common,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (16, 24, 24),
        },
        {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "encoder_attention_mask": text_mask,
            "pooled_projections": torch.randn(1, 8),
            "guidance": torch.tensor([6.0]),
            **time,
        },
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
        suffix=TEXT,
    )
    return {"wan": wan, "cogvideox": cogvideox, "hunyuan": hunyuan}


def write(name: str, given: Model, folder: Path, opsets: list[int]) -> None:
    """Export one model, with its inputs and what PyTorch computes from them."""
    model = given.build()
    plan = given.plan(model)
    with torch.no_grad():
        programs = {
            "dense": torch.export.export(model, (), given.call, strict=False),
            "sparse": export_program(model, given.call, plan, standard_ops=True),
        }
        dense = model(**given.call)[0]
        apply_plan(model, plan, inner="eager")
        sparse = model(**given.call)[0]
        restore(model)
    for what, program in programs.items():
        for opset in opsets:
            write_onnx(program, folder / f"{name}-{what}-{opset}.onnx", opset=opset)
    inputs = {k: v.numpy() for k, v in given.call.items() if isinstance(v, torch.Tensor)}
    np.savez(folder / f"{name}.npz", dense_output=dense, sparse_output=sparse, **inputs)
    plan.save(folder / f"{name}.evdit.json")


def measure(
    name: str, folder: Path, opsets: list[int], rounds: int, threads: int
) -> dict[str, Any]:
    """Time one model's files in turn; those that onnxruntime does not run are named."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    kept = dict(np.load(folder / f"{name}.npz"))
    outputs = {what: kept.pop(f"{what}_output") for what in ("dense", "sparse")}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    running, errors, refused = {}, {}, {}
    for what in outputs:
        for opset in opsets:
            key, path = f"{what}, opset {opset}", folder / f"{name}-{what}-{opset}.onnx"
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            feeds = {entry.name: kept[entry.name] for entry in session.get_inputs()}
            try:
                (out,) = session.run(None, feeds)
            except Fail as error:
                refused[key] = str(error).split("Status Message: ")[-1].split(" was false. ")[-1]
                continue
            gap = np.linalg.norm(out - outputs[what]) / np.linalg.norm(outputs[what])
            errors[key] = float(gap)
            assert gap < CLOSE, f"{key} of {name} is {gap:.1e} from PyTorch: nothing is timed"
            running[key] = lambda run=session.run, feeds=feeds: run(None, feeds)
    times = interleaved(running, rounds, "cpu")
    medians = {key: 1e3 * statistics.median(seconds) for key, seconds in times.items()}
    best = {
        what: min(ms for key, ms in medians.items() if key.startswith(what)) for what in outputs
    }
    plan = Plan.load(folder / f"{name}.evdit.json")
    return {
        "model": plan.model_class,
        "rules": [site.describe(plan.grid.frames) for site in plan.sites if site.rule],
        "density": plan.density,
        "median_ms": medians,
        "speedup": best["dense"] / best["sparse"],
        "relative_error": errors,
        "not_run_by_onnxruntime": refused,
    }


def quote(page: str, results: Path) -> str:
    """The page with its table made anew: no number there is typed by hand."""
    content = json.loads(results.read_text(encoding="utf-8"))
    facts = content["environment"]
    lines = ["| model | density | dense, ms | sparse, ms | speedup |", "|---|---|---|---|---|"]
    for row in content["rows"].values():
        dense, sparse = (
            ", ".join(
                f"{ms:.0f} ({key.split(', ')[1]})"
                for key, ms in row["median_ms"].items()
                if key.startswith(what)
            )
            for what in ("dense", "sparse")
        )
        lines.append(
            f"| {row['model']} | {row['density']:.2f} | {dense} | {sparse} | "
            f"{row['speedup']:.2f}x |"
        )
    lines += [
        "",
        f"{facts['frames']} frames of {facts['tokens_per_frame']} tokens, {facts['heads']} heads x "
        f"{facts['head_dim']}, two sites, float32, {facts['threads']} CPU threads, onnxruntime "
        f"{facts['onnxruntime']}; medians of {facts['rounds']} interleaved runs. The speedup is "
        "that over the fastest dense file.",
    ]
    block = re.compile(r"(<!-- onnx: .*? -->\n).*?(<!-- /onnx -->)", re.DOTALL)
    return block.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("write", "measure", "quote"))
    parser.add_argument("--folder", type=Path, default=Path("onnx-speed"), help="for the models")
    parser.add_argument("--models", nargs="*", default=list(models()))
    parser.add_argument("--opsets", nargs="*", type=int, default=[18, 23])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    if given.action == "quote":
        quoted = quote(PAGE.read_text(encoding="utf-8"), given.output)
        PAGE.write_text(quoted, encoding="utf-8")
        return
    if given.action == "write":
        given.folder.mkdir(exist_ok=True)
        for name in given.models:
            write(name, models()[name], given.folder, given.opsets)
        return
    import onnxruntime

    shape = {"frames": GRID.frames, "tokens_per_frame": GRID.tokens_per_frame}
    sizes = {**shape, "heads": HEADS, "head_dim": HEAD_DIM, "text_tokens": TEXT, "batch": 1}
    facts = {
        **environment("cpu"),
        "onnxruntime": onnxruntime.__version__,
        "threads": given.threads,
        "rounds": given.rounds,
        "dtype": "float32",
        **sizes,
    }
    rows = Rows(given.output, facts)
    for name in given.models:
        row = measure(name, given.folder, given.opsets, given.rounds, given.threads)
        rows.add(name, row)
        sys.stdout.write(f"{name}: {row['speedup']:.2f}x at density {row['density']:.2f}\n")


if __name__ == "__main__":
    main()
