"""Timing contenders side by side, and keeping rows in a JSON file that survives an interruption."""

import json
import os
import platform
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from evdit_opt.versions import installed_versions

__all__ = ["CLOCKS", "Rows", "device_folder", "environment", "interleaved", "peak_bytes"]

CLOCKS = {"thread": time.thread_time, "process": time.process_time, "wall": time.perf_counter}
Contenders = Mapping[str, Callable[[], object]]
# Larger than any cache of a GPU: what a contender left there must not help the next one.
FLUSH_BYTES = 256 << 20


def interleaved(
    contenders: Contenders,
    rounds: int,
    device: str,
    clock: str = "wall",
    give_up: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, after one round to warm up.

    Every contender runs once per round, so that what disturbs the machine disturbs all of them, and
    in another order each time, so that nobody always finds the caches as the same other left them.
    On CUDA the time is that between two events, with cold caches.

    Args:
        contenders: name -> the call.
        rounds: rounds that are timed.
        device: "cpu" or "cuda".
        clock: one of ``CLOCKS``; not used on CUDA.
        give_up: who takes this many times as long as the fastest in the first round is not run
            again.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    alive, order = list(contenders), random.Random(0)
    for _ in range(rounds):
        for name in order.sample(alive, len(alive)):
            if flush is not None:
                flush.zero_()
            times[name].append(_seconds(contenders[name], device, clock))
        if give_up is not None:
            best = min(times[name][-1] for name in alive)
            alive = [name for name in alive if times[name][-1] <= give_up * best]
            give_up = None
    return times


def _seconds(run: Callable[[], object], device: str, clock: str) -> float:
    if device != "cuda":
        start = CLOCKS[clock]()
        run()
        return CLOCKS[clock]() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes of CUDA memory that a call takes beside what is there before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Where and when numbers came from.

    Args:
        device: "cpu" or "cuda".
        commit: of this repository; None asks git, where there is one.
    """
    if commit is None and shutil.which("git") is not None:
        ask = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    found: dict[str, Any] = {
        "device": device,
        "device_name": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        **installed_versions(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        found["device_name"] = torch.cuda.get_device_name()
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def device_folder(device: str) -> str:
    """Name of the folder under ``benchmarks/results`` for numbers of this machine."""
    if device != "cuda":
        return device
    return "-".join(torch.cuda.get_device_name().lower().replace("nvidia", "").split())


class Rows:
    """Rows of results by name, in a JSON file that is whole after every row."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": dict(facts), "rows": {}}
        if path.exists():
            self.content["rows"] = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def __contains__(self, name: str) -> bool:
        return name in self.content["rows"]

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.content["rows"][name]

    def names(self) -> list[str]:
        """Names of the rows there are, in the order they came."""
        return list(self.content["rows"])

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row, with the commit that it is of if it does not say so, and write the file."""
        facts = self.content["environment"]
        known = {key: row.get(key, facts[key]) for key in ("commit", "date")}
        self.content["rows"][name] = {**row, **known}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)
