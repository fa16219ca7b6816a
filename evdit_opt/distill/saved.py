"""What fine-tuning leaves behind: weights, the schedule they are for, and the plan.

A folder holds ``weights.safetensors`` (adapters, or all weights of the denoiser),
``evdit_finetune.json`` and, after a search, ``evdit_plan.json``, which records the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from evdit_opt import strict_json
from evdit_opt.changed_layers import changed_layers
from evdit_opt.distill.adapters import add_lora, load_weights, save_weights
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.errors import DistillationError
from evdit_opt.models import denoiser_of
from evdit_opt.plan import PLAN_FILE, Plan
from evdit_opt.plan_records import FinetuneRecord
from evdit_opt.scheduler import FewStepScheduler
from evdit_opt.whole_file import whole_file

__all__ = ["restore_finetuned", "save_finetuned"]

WEIGHTS, RECORD = "weights.safetensors", "evdit_finetune.json"


def save_finetuned(
    model: nn.Module,
    before: nn.Module,
    scheduler: FewStepScheduler,
    config: FinetuneConfig,
    plan: Plan | None,
    folder: Path,
) -> Plan | None:
    """Write a fine-tuned denoiser, its schedule and its plan; returns the plan with the record.

    ``before`` is the denoiser that training began with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = config.lora_rank or 0
    assert rank != "auto", "decided before training"
    record = FinetuneRecord(
        steps=scheduler.config.steps,
        full_steps=scheduler.config.full_steps,
        time_shift=float(scheduler.config.time_shift),
        lora_rank=rank,
        lora_modules=config.lora_modules if rank else (),
        weights_sha256=save_weights(model, folder / WEIGHTS),
        consistency=scheduler.config.segments is not None,
        changed=changed_layers(before, model),
    )
    if plan is not None:
        plan = replace(plan, finetune=record)
        plan.save(folder / PLAN_FILE)
    try:
        with whole_file(folder / RECORD) as partial:
            partial.write_text(strict_json.dump(record), encoding="utf-8")
    except OSError as error:
        raise DistillationError(
            f"expected to write {folder / RECORD}: {error}; make room and start again"
        ) from error
    return plan


def restore_finetuned(pipe: Any, folder: Path, **options: Any) -> Plan | None:
    """Make a pipeline what fine-tuning made of it, bit for bit: weights, scheduler and plan.

    Args:
        pipe: as it was loaded before fine-tuning; changed in place.
        folder: the ``result`` of a fine-tuning.
        options: of ``evdit_opt.apply_plan``.

    Returns:
        The plan that was applied; None if there is none.

    Raises:
        DistillationError: the folder is incomplete, or its weights are not those it records.
        PlanError: the record or the plan is damaged.
        PlanMismatchError: the plan is of another model.
    """
    from evdit_opt import api

    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        raise DistillationError(
            f"expected {RECORD} and {WEIGHTS} in {folder}: {error}; give the 'result' folder of a "
            "fine-tuning"
        ) from error
    record: FinetuneRecord = strict_json.build(FinetuneRecord, strict_json.parse(text), RECORD)
    if digest != record.weights_sha256:
        raise DistillationError(
            f"expected {folder / WEIGHTS} to hash to {record.weights_sha256}, got {digest}; copy "
            "the whole folder again"
        )
    plan = Plan.pull(folder) if (folder / PLAN_FILE).exists() else None
    model = denoiser_of(pipe)
    if record.lora_rank:
        add_lora(model, record.lora_rank, record.lora_modules, seed=0)
    load_weights(model, folder / WEIGHTS)
    model.eval().requires_grad_(False)
    pipe.scheduler = record.scheduler(pipe.scheduler)
    if plan is not None and plan.rules:
        api.apply_plan(pipe, plan, **options)
    return plan
