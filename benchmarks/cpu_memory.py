"""Peak memory of one attention call on a CPU, as the operating system counts it.

    python -m benchmarks.cpu_memory decomposed 2 float32

prints bytes: q, k and v, and what the call takes beside them at its peak (resident memory), its
result included. One fresh process per call, so that nothing another contender left behind can be
used again; and ``peak`` has the allocator give tensors back to the system when they are freed, so
that holes between them do not count.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.contenders import Attention, make_inputs, ours
from benchmarks.shapes import Shape
from evdit_opt.masks import Rule

__all__ = ["MEMORY", "peak"]

MEMORY = Shape(
    name="memory", frames=16, tokens=1560, heads=4, head_dim=64,
    rules=(Rule(1), Rule(2), Rule(2, weighting="balanced"), Rule(4)),
)  # fmt: skip
# Enough for threads to start, and for kernels to be read from disk.
WARM = Shape(name="warm", frames=16, tokens=100, heads=4, head_dim=64, rules=())


def peak(contender: str, rule: int, dtype: str, frames: int = MEMORY.frames) -> dict[str, int]:
    """Bytes of one call, from a process of its own.

    Args:
        contender: "dense" or an implementation.
        rule: which of ``MEMORY.rules``.
        dtype: "float32", ...
        frames: of the video.
    """
    command = [sys.executable, "-m", "benchmarks.cpu_memory", contender, str(rule), dtype]
    done = subprocess.run(
        [*command, "--frames", str(frames), "--threads", str(torch.get_num_threads())],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    found: dict[str, int] = json.loads(done.stdout)
    return found


def measure(contender: str, rule: Rule, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """The call, in this process, which must not have done much before."""
    inputs = make_inputs(shape, dtype, "cpu")
    _attention(contender, rule, WARM)(*make_inputs(WARM, dtype, "cpu"))
    attention = _attention(contender, rule, shape)
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := now
    attention(*inputs)
    return {"inputs": sum(x.nbytes for x in inputs), "beside": _status("VmHWM") - before}


def _attention(contender: str, rule: Rule, shape: Shape) -> Attention:
    if contender == "dense":
        return scaled_dot_product_attention
    return ours(shape, rule.mask(shape.frames), contender)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender")
    parser.add_argument("rule", type=int, help="which of MEMORY.rules")
    parser.add_argument("dtype")
    parser.add_argument("--frames", type=int, default=MEMORY.frames)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = Shape(
        name="memory", frames=arguments.frames, tokens=MEMORY.tokens, heads=MEMORY.heads,
        head_dim=MEMORY.head_dim, rules=(),
    )  # fmt: skip
    with torch.no_grad():
        rule, dtype = MEMORY.rules[arguments.rule], getattr(torch, arguments.dtype)
        print(json.dumps(measure(arguments.contender, rule, dtype, shape)))


if __name__ == "__main__":
    main()
