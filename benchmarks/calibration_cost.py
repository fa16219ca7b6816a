"""What a calibration costs: CPU time and peak memory, against dense runs of the same prompts.

    python -m benchmarks.calibration_cost

TinyWan, one thread, each part in a process of its own. CPU time, so that a busy machine matters
little. Memory that is freed goes back to the system at once (MALLOC_MMAP_THRESHOLD_): else the peak
tells more of what glibc keeps than of what is in use.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

OUTPUT = Path(__file__).parent / "results/cpu/calibration_cost.json"


def part(what: str, prompts: int, steps: int) -> dict[str, float]:
    """Run one part here; seconds of CPU time, without loading, and peak memory."""
    import torch

    from evdit_opt.calibrate.make import make_plan
    from evdit_opt.config import Config
    from evdit_opt.demo.clips import TRAINED
    from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
    from evdit_opt.models import as_denoiser

    torch.set_num_threads(1)
    texts = [TRAINED[n * 7 % len(TRAINED)].caption() for n in range(prompts)]
    pipe = load_tinywan()
    start = time.process_time()
    if what == "dense":
        denoiser = as_denoiser(pipe, texts, TINYWAN_CALL)
        for n, text in enumerate(texts):
            denoiser.run(text, n, steps)
    else:
        config = Config(
            density=0.3, calib_steps=steps, verify_prompts=0, pipe_kwargs=TINYWAN_CALL,
            inner="eager", progress=False,
        )  # fmt: skip
        make_plan(pipe, texts, config)
    return {
        "cpu_s": time.process_time() - start,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--part", choices=("dense", "calibration"))
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(part(arguments.part, arguments.prompts, arguments.steps)))
        return
    given = ["--prompts", str(arguments.prompts), "--steps", str(arguments.steps)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    found = {}
    for what in ("dense", "calibration"):
        command = [sys.executable, "-m", "benchmarks.calibration_cost", "--part", what, *given]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[what] = json.loads(done.stdout.splitlines()[-1])
    from evdit_opt.versions import installed_versions

    dense, ours = found["dense"], found["calibration"]
    report = {
        "what": "make_plan at density 0.3 without verification, against dense runs of its prompts",
        "prompts": arguments.prompts, "steps": arguments.steps, **found,
        "dense_passes": ours["cpu_s"] / dense["cpu_s"],
        "memory_ratio": ours["peak_mib"] / dense["peak_mib"],
        "versions": installed_versions(),
    }  # fmt: skip
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
