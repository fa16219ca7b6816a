"""The stages in a line: consistency distillation, search, knowledge distillation; in either order.

Every stage has a folder. Its checkpoint lets it go on at the step where it was killed, its result
(weights or plan, written whole or not at all) lets the next run skip it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from evdit_opt import apply
from evdit_opt.calibrate.make import make_plan
from evdit_opt.config import Config
from evdit_opt.distill.adapters import add_lora, load_weights, lora_rank_for, save_weights
from evdit_opt.distill.beforehand import laid_out, require_one_guidance, require_scaled
from evdit_opt.distill.begun import described, require_same, write_begun
from evdit_opt.distill.conditions import Conditions
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.data import LatentShards, teacher_latents
from evdit_opt.distill.encode import encode_videos
from evdit_opt.distill.knowledge import SiteOutputs, hooks_while_recomputing, train_only
from evdit_opt.distill.loop import Losses, TrainingConfig, require_possible, train
from evdit_opt.distill.processes import first_process, processes
from evdit_opt.distill.rate import knowledge_rate
from evdit_opt.distill.samples import write_samples
from evdit_opt.distill.saved import save_finetuned
from evdit_opt.distill.segments import cut
from evdit_opt.distill.stages import Setting, consistency_stage, knowledge_stage
from evdit_opt.distill.videos import list_videos
from evdit_opt.errors import AlreadyOptimizedError, DistillationError
from evdit_opt.models import denoiser_of
from evdit_opt.plan import PLAN_FILE, Plan
from evdit_opt.reuse import without_reuse
from evdit_opt.scheduler import FewStepScheduler

__all__ = ["Finetuning", "finetune"]

logger = logging.getLogger(__name__)

WEIGHTS, PLAN = "weights.safetensors", "plan.evdit.json"


def finetune(
    pipe: Any,
    prompts: Iterable[str],
    config: FinetuneConfig,
    *,
    steps: int,
    search: Config | None = None,
) -> Plan | None:
    """Fine-tune a pipeline in place, for few steps and sparse attention.

    Its transformer's weights change, and its scheduler becomes a ``FewStepScheduler``; the plan is
    not applied. After a consistency stage call the result with ``guidance_scale=1``: guidance is
    in the weights.

    Args:
        pipe: a diffusers video pipeline with one transformer.
        prompts: captions to train on, and to calibrate with; a single text is one.
        config: see `FinetuneConfig`.
        steps: of the student.
        search: of the search stage; its ``pipe_kwargs`` are those of all calls, but for guidance,
            which ``config`` says.

    Returns:
        The plan; None without a search stage. It is in ``config.folder / "result"`` with the
        weights: see `evdit_opt.distill.saved`.

    Raises:
        EvditError: as the stages; what was done so far is kept in ``config.folder``.
    """
    run = Finetuning(pipe, prompts, config, steps, search or Config())
    for index, stage in enumerate(config.stages):
        logger.info("stage %d of %d: %s", index + 1, len(config.stages), stage)
        run.stage(index)
    return run.finish()


class Finetuning:
    """A fine-tuning in progress.

    Attributes:
        model: the student.
        teacher: a frozen copy of it as it came.
        plan: of the search stage, once it is done.
        trained: how many numbers are trained.
        config: as given, with the rank of the adapters decided.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Iterable[str],
        config: FinetuneConfig,
        steps: int,
        search: Config,
    ) -> None:
        self.pipe, self.steps, self.search = pipe, steps, search
        self.prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        self.model: nn.Module = denoiser_of(pipe)
        if self.model is pipe:
            raise DistillationError("expected a diffusers pipeline to fine-tune, got a module")
        if apply.is_optimized(self.model):
            raise AlreadyOptimizedError(
                "expected a pipeline without a plan; call evdit_opt.restore(pipe) first"
            )
        if any("lora_" in name for name in self.model.state_dict()):
            raise DistillationError(
                "expected a pipeline without adapters, which training would leave out or mix with "
                "its own; call pipe.fuse_lora() and pipe.unload_lora_weights() first"
            )
        if not self.prompts:
            raise DistillationError("expected at least one prompt to train on, got none")
        recomputes = config.knowledge.checkpointing or getattr(
            self.model, "is_gradient_checkpointing", False
        )
        if "knowledge" in config.stages and recomputes and self.search.reuse:
            raise DistillationError(
                "expected knowledge.checkpointing to be false where the plan may reuse residuals, "
                "got true: computing a refresh again would write them again; set it to false, or "
                "search with reuse=False"
            )
        self.config = replace(config, lora_rank=lora_rank_for(self.model, config.lora_rank))
        # Before anything is loaded or trained: what is impossible is the first thing to know.
        require_one_guidance(config, self.search)
        for index, stage in enumerate(config.stages):
            require_same(self._folder(index), self._described(index))
            if stage != "search":
                require_possible(self.model, getattr(config, stage))
                require_scaled(self.model, stage, getattr(config, stage))
        self.learns = "consistency" in config.stages
        self.reducer = self._few_steps(None)
        self.few = self._few_steps(steps) if self.learns else self.reducer
        self.whole, self.shape = laid_out(pipe, self.prompts, self.config, self.search)
        if self.learns and config.latents is not None:
            self._latents()
        if self.learns and config.data is not None:
            list_videos(config.data.videos)
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.model.eval().requires_grad_(True)
        if self.config.lora_rank is not None:
            rank = int(self.config.lora_rank)
            logger.info("training adapters of rank %d", rank)
            add_lora(self.model, rank, config.lora_modules, config.seed)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.trainable = list(trained)
        if coarse := {str(p.dtype)[6:] for p in trained.values()} - {"float32"}:
            raise DistillationError(
                f"expected weights in float32 to train all of them, got {min(coarse)}, in which "
                "the optimizer's steps are lost; leave dtype out and set bf16: true of the stages, "
                "or train adapters with lora_rank"
            )
        self.plan: Plan | None = None

    @property
    def trained(self) -> int:
        """How many numbers are trained at present."""
        return sum(value.numel() for value in self.model.parameters() if value.requires_grad)

    def stage(self, index: int) -> None:
        """Do one stage, or what is left of it."""
        name, folder = self.config.stages[index], self._folder(index)
        with first_process() as mine:
            if mine:
                write_begun(folder, self._described(index))
        if name == "search":
            with first_process() as mine:
                if mine and not (folder / PLAN).exists():
                    self._search(index).save(folder / PLAN)
            self.plan = Plan.load(folder / PLAN)
            return
        if (folder / WEIGHTS).exists():
            load_weights(self.model, folder / WEIGHTS)
            return
        with self.losses(index) as (losses, settings):
            if name == "knowledge" and settings.learning_rate == "auto":
                rate = knowledge_rate(self.model, losses, settings, self._edges(index), folder)
                settings = replace(settings, learning_rate=rate)
            for record in train(self.model, losses, settings, folder):
                logger.info("%s %s", name, record)
                self._sample(index, folder / "samples", record["step"])
        with first_process() as mine:
            if mine:
                save_weights(self.model, folder / WEIGHTS)

    @contextmanager
    def losses(
        self, index: int, latents: LatentShards | None = None
    ) -> Iterator[tuple[Losses, TrainingConfig]]:
        """The losses of a training stage, with the model as it is trained there.

        Args:
            index: of the stage.
            latents: for consistency distillation, instead of the configured or the teacher's.
        """
        config = self.config
        if config.stages[index] == "consistency":
            latents = latents or self._latents()
            # Its samples are single points of a run, where there is nothing to reuse.
            plan = None if self.plan is None else without_reuse(self.plan)
            setting = self._setting(self.steps, latents)  # stops in a call, which no graph can
            if plan is not None:
                apply.apply_plan(self.model, plan, inner="eager")
            try:
                yield consistency_stage(setting, self.teacher, latents), config.consistency
            finally:
                if plan is not None:
                    apply.restore(self.model)
            return
        assert self.plan is not None, "checked by FinetuneConfig"
        sites = tuple(self.plan.rules)
        if not sites:
            raise DistillationError(
                "expected a plan with sparse sites to distil into, this one leaves all dense; "
                "search with a lower density, or leave the knowledge stage out"
            )
        done = "consistency" in config.stages[:index]
        setting = self._setting(self._edges(index))
        teacher = copy.deepcopy(self.model).requires_grad_(False)
        train_only(self.model, self.trainable, sites if config.attention_only else None)
        watched, wanted = SiteOutputs(self.model, sites), SiteOutputs(teacher, sites)
        apply.apply_plan(self.model, self.plan, inner="eager")
        try:
            guidance = 1.0 if done else config.guidance
            reuse = self.plan.reuse
            losses = knowledge_stage(setting, teacher, watched, wanted, guidance, reuse)
            with hooks_while_recomputing():
                yield losses, config.knowledge
        finally:
            apply.restore(self.model)
            watched.remove()
            train_only(self.model, self.trainable)

    def finish(self) -> Plan | None:
        """Save the result, and give the pipeline its scheduler."""
        result = self.config.folder / "result"
        with first_process() as mine:
            if mine:
                self.plan = save_finetuned(
                    self.model, self.teacher, self.few, self.config, self.plan, result
                )
        if self.plan is not None:
            self.plan = Plan.load(result / PLAN_FILE)
        self.model.requires_grad_(False)
        self.pipe.scheduler = self.few
        if self.learns:
            logger.info("call the pipeline with guidance_scale=1: guidance is in its weights now")
        return self.plan

    def _edges(self, index: int) -> int:
        """Of a walk of the knowledge stage.

        Few calls are all a consistency student makes; before that, more points are what matters.
        """
        if "consistency" in self.config.stages[:index]:
            return self.steps
        return min(self.config.full_steps, 4 * self.steps)

    def _search(self, index: int) -> Plan:
        """The plan, for the pipeline as it will be used."""
        few = "consistency" in self.config.stages[:index]
        with self._as_used(self.few if few else self.reducer, few) as call:
            settings = replace(self.search, calib_steps=self.steps, pipe_kwargs=call)
            return make_plan(self.pipe, self.prompts, settings)

    @contextmanager
    def _as_used(self, scheduler: Any, learned: bool) -> Iterator[dict[str, Any]]:
        """The pipeline with a scheduler; arguments of its calls, guided till that is learned."""
        before = self.pipe.scheduler
        self.pipe.scheduler = scheduler
        try:
            yield {**self.search.pipe_kwargs, "guidance_scale": 1.0} if learned else self._guided()
        finally:
            self.pipe.scheduler = before

    def _sample(self, index: int, folder: Path, step: int) -> None:
        """Clips of the model in training, where they are due."""
        wanted = self.config.samples
        if wanted is None or step % wanted.every or not processes().is_main_process:
            return
        few = "consistency" in self.config.stages[: index + 1]
        steps = self.steps if few else self.config.full_steps
        with self._as_used(self.few if few else self.pipe.scheduler, few) as call:
            write_samples(self.pipe, wanted, {**call, "num_inference_steps": steps}, folder, step)

    def _latents(self) -> LatentShards:
        config = self.config
        folder = config.folder / "latents" if config.latents is None else config.latents
        if config.latents is None:
            with first_process() as mine:
                if mine:
                    self._fill(folder)
        found = LatentShards(folder)
        if wrong := found.shapes - {self.shape}:
            raise DistillationError(
                f"expected latents {list(self.shape)} in {folder}, as the pipeline's calls make "
                f"them, got {list(min(wrong))}; set num_frames, height and width to theirs"
            )
        return found

    def _fill(self, folder: Path) -> None:
        """Make all latents that are not there yet."""
        config = self.config
        if config.data is not None:
            encode_videos(self.pipe, config.data, folder, self.search.pipe_kwargs)
            return
        self.pipe.transformer = self.teacher
        try:
            teacher_latents(
                self.pipe,
                self.prompts,
                folder,
                count=config.clips,
                steps=config.full_steps,
                seed=config.seed,
                call=self._guided(),
            )
        finally:
            self.pipe.transformer = self.model

    def _guided(self) -> dict[str, Any]:
        call = {**self.search.pipe_kwargs, "guidance_scale": self.config.guidance}
        if self.config.negative_prompt:
            call["negative_prompt"] = self.config.negative_prompt
        return call

    def _setting(self, edges: int, latents: LatentShards | None = None) -> Setting:
        config = self.config
        texts = {} if latents is None else latents.texts
        captions = [] if latents is None else [c for c in latents.captions if c not in texts]
        prompts = [config.negative_prompt, *self.prompts, *captions]
        return Setting(
            config=config,
            segments=cut(self.whole, segments=edges, time_shift=config.time_shift),
            conditions=Conditions(self.pipe, prompts, self.search.pipe_kwargs, texts),
            prompts=self.prompts,
            device=next(self.model.parameters()).device,
        )

    def _folder(self, index: int) -> Path:
        return self.config.folder / f"{index + 1}-{self.config.stages[index]}"

    def _described(self, index: int) -> dict[str, str]:
        return described(self.config, self.prompts, self.steps, self.search, index)

    def _few_steps(self, segments: int | None) -> FewStepScheduler:
        config = self.config
        return FewStepScheduler(
            self.pipe.scheduler,
            steps=self.steps,
            segments=segments,
            full_steps=config.full_steps,
            time_shift=config.time_shift,
        )
