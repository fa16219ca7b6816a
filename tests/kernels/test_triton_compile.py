"""The fused kernels compile for NVIDIA chips, fit into them, and do not spill. No GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evdit_opt.kernels.triton_configs import SHARED_KIB, family
from tests.often import often

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 89, 90, 100, 120)
KERNELS = ("forward", "grad_q", "grad_kv")
HEAD_DIMS = (64, 96, 128)

Build = dict[str, Any]


def compile_all(builds: list[Build]) -> list[Build]:
    """The builds with what the compiler said, made in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    script = ROOT / "tests/kernels/compile_triton.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(builds)],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def problems(build: Build, needs_wgmma: bool = True) -> list[str]:
    """What a committed configuration must not do."""
    capability = build["capability"]
    limit = SHARED_KIB[family(divmod(capability, 10))] * 1024
    found = []
    if build["shared_bytes"] > limit:
        found.append(f"takes {build['shared_bytes']} bytes of shared memory of {limit}")
    if build["spilled_bytes"] > (0 if capability == 90 else 64):
        found.append(f"spills {build['spilled_bytes']} bytes")
    if capability == 90 and needs_wgmma and (build["wgmma"] == 0 or build["serialized"]):
        found.append("does not use wgmma, or one after the other")
    if build.get("use_tma") and build["tma"] == 0:
        found.append("does not use the tensor memory accelerator")
    return found


def check(builds: list[Build]) -> None:
    """Compile, print a table (pytest -s), and fail with everything that is wrong."""
    results = compile_all(builds)
    assert len(results) == len(builds)
    print("\nchip  kernel   head_dim  registers  shared KiB  spilled  Triton")
    for r in results:
        kind = "".join(f" {name}" for name in ("masked", "grouped", "use_tma") if r.get(name))
        kind += f" {r.get('strides', '')}"
        print(
            f"{r['capability']:4}  {r['kernel']:7}  {r['head_dim']:8}  {r['registers']:9}  "
            f"{r['shared_bytes'] / 1024:10.1f}  {r['spilled_bytes']:7}  {r['triton']}{kind}"
        )
    wrong = [(found, r) for r in results if (found := problems(r))]
    assert wrong == []


@pytest.mark.parametrize(
    "capability", often(["80", "90", "100"], {str(chip): chip for chip in CAPABILITIES})
)
def test_defaults(capability: int) -> None:
    """All common head_dims on Hopper; on the others see ``test_every_default_fits``, too."""
    head_dims = HEAD_DIMS if capability == 90 else (128,)
    check(
        [
            {"kernel": kernel, "capability": capability, "head_dim": head_dim}
            for kernel in KERNELS
            for head_dim in head_dims
        ]
    )


def test_padding_masks_weights_and_groups() -> None:
    check(
        [
            {
                "kernel": kernel,
                "capability": 90,
                "head_dim": 128,
                "masked": True,
                "grouped": True,
            }
            for kernel in KERNELS
        ]
    )


def test_strides_past_32_bits() -> None:
    check([{"kernel": "forward", "capability": 90, "head_dim": 96, "strides": "i64"}])


def test_tensor_memory_accelerator() -> None:
    check(
        [
            {"kernel": "forward", "capability": 90, "head_dim": head_dim, "use_tma": True}
            for head_dim in (72, 128)
        ]
    )


def test_serialized_wgmma_would_be_seen() -> None:
    build = {"kernel": "forward", "capability": 90, "head_dim": 128, "maxnreg": 128}
    (result,) = compile_all([build])
    assert len(problems(result)) == 2, "no spills, or no C7512 from ptxas, with half the registers"


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_default_fits(capability: int, dtype: str) -> None:
    """Every head_dim, with a padding mask and weights, the backward of 256 too.

    Small blocks of wide heads, and float32, do not use wgmma.
    """
    results = compile_all(
        [
            {"kernel": kernel, "capability": capability, "head_dim": head_dim, "dtype": dtype,
             "masked": more, "grouped": more}
            for kernel in KERNELS
            for head_dim in (16, 64, 72, 96, 128, 144, 160, 192, 256)
            for more in (False, True)
        ]
    )  # fmt: skip
    wrong = [(found, r) for r in results if (found := problems(r, needs_wgmma=False))]
    assert wrong == []
