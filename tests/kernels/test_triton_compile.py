"""The fused kernel compiles for NVIDIA chips, fits into them, and does not spill. No GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
CASES = [(capability, head_dim, False) for capability in SHARED_KIB for head_dim in (64, 96, 128)]
CASES += [(90, 128, True)]


@pytest.fixture(scope="module")
def builds() -> dict[tuple[int, int, bool], dict[str, int]]:
    """Every case, compiled in one process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests/kernels/compile_triton.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(CASES)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(r["capability"], r["head_dim"], r["masked"]): r for r in results}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"sm_{c[0]}-{c[1]}{'-masked' * c[2]}")
def test_default_configuration_fits(
    case: tuple[int, int, bool], builds: dict[tuple[int, int, bool], dict[str, int]]
) -> None:
    build = builds[case]
    assert build["shared_bytes"] <= SHARED_KIB[case[0]] * 1024, build
    assert build["spilled_bytes"] <= (0 if case[0] == 90 else 128), build
    if case[0] == 90:
        assert build["wgmma"] > 0, build
