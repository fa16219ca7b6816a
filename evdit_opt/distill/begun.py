"""What the stages of a run were begun with: none goes on, or is skipped, with other settings.

A checkpoint knows the settings of its training alone; a changed guidance scale or number of steps
would continue it, or take what is finished for the new run's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from evdit_opt.config import Config
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.errors import DistillationError
from evdit_opt.whole_file import whole_file

__all__ = ["described", "require_same", "write_begun"]

BEGUN = "begun.json"
ALWAYS = ("guidance", "negative_prompt", "full_steps", "time_shift", "seed", "lora_rank",
          "lora_modules")  # fmt: skip
"""Settings of a fine-tuning that every stage depends on."""

RUNNING = ("inner", "impl", "progress", "pipe_kwargs")
"""Settings of a search that say how it runs, not what it finds; ``pipe_kwargs`` are all stages'."""


def described(
    config: FinetuneConfig, prompts: Sequence[str], steps: int, search: Config, index: int
) -> dict[str, str]:
    """What the result of a stage depends on, those before it included.

    Args:
        config: of the run, the rank of its adapters decided.
        prompts: of the run.
        steps: of the student.
        search: of the search stage.
        index: of the stage.
    """
    found: dict[str, Any] = {
        "steps": steps,
        "prompts": _digest(prompts),
        "call": {name: str(value) for name, value in search.pipe_kwargs.items()},
        "stages": config.stages[: index + 1],
    }
    found |= {name: getattr(config, name) for name in ALWAYS}
    if "consistency" in found["stages"]:
        found["first_teacher_steps"], found["huber"] = config.first_teacher_steps, config.huber
        if config.latents is None and config.data is None:
            found["clips"] = config.clips
        found |= _named("consistency", config.consistency.settings())
    if "search" in found["stages"]:
        known = {item.name: getattr(search, item.name) for item in fields(search)}
        found |= _named("search", {n: v for n, v in known.items() if n not in RUNNING})
    if "knowledge" in found["stages"]:
        found["attention_only"] = config.attention_only
        found |= _named("weights", asdict(config.weights))
        found |= _named("knowledge", config.knowledge.settings())
    return {name: str(value) for name, value in found.items()}


def require_same(folder: Path, settings: Mapping[str, str]) -> None:
    """Refuse a stage's folder that was begun with other settings.

    Raises:
        DistillationError: naming what changed.
    """
    path = folder / BEGUN
    if not path.exists():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DistillationError(
            f"expected the settings of a run in {path}, cannot read them: {error}; choose another "
            "folder"
        ) from error
    changed = [
        f"{name} {known.get(name)}, now {settings.get(name)}"
        for name in sorted(known.keys() | settings.keys())
        if known.get(name) != settings.get(name)
    ]
    if changed:
        raise DistillationError(
            f"expected the settings that {folder} was begun with, got others ({'; '.join(changed)})"
            "; go on with those, choose another folder, or remove this one and those after it"
        )


def write_begun(folder: Path, settings: Mapping[str, str]) -> None:
    """Make the folder of a stage that begins, and write down its settings there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / BEGUN) as partial:
            partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DistillationError(
            f"expected to write {folder / BEGUN}: {error}; make room and start again"
        ) from error


def _named(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{stage}.{name}": value for name, value in settings.items()}


def _digest(prompts: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    return f"{len(prompts)} of SHA-256 {digest[:16]}"
