"""What a person may set about fine-tuning, also as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from evdit_opt.distill.encode import VideoData
from evdit_opt.distill.knowledge import KnowledgeWeights
from evdit_opt.distill.loop import TrainingConfig
from evdit_opt.distill.samples import SampleConfig
from evdit_opt.errors import DistillationError

__all__ = ["STAGES", "FinetuneConfig", "read_config"]

STAGES = ("consistency", "search", "knowledge")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """How a pipeline is taught to need few steps and little attention.

    Attributes:
        folder: of checkpoints, logs and the result; a run that finds its own there goes on.
        stages: which, in which order: "search" makes the plan and comes before "knowledge". The
            paper's order is the default; ("search", "knowledge", "consistency") is its other one.
        consistency: training of the first stage.
        knowledge: training of the last one; its steps visit the edges of one walk after the other.
        guidance: classifier-free guidance scale that the student learns to do in one call; the
            result is then called with ``guidance_scale=1``.
        negative_prompt: of that guidance.
        full_steps: of the teacher's schedule.
        time_shift: see ``FewStepScheduler``.
        first_teacher_steps: teacher steps a segment at the beginning of training; they grow to all
            there are, log-linearly.
        huber: c of the pseudo-Huber loss; None: squares.
        weights: terms of the knowledge loss.
        attention_only: train only the plan's sites in the last stage.
        lora_rank: train adapters of this rank; None: all weights. "auto": adapters of rank 32 for
            models of a billion numbers and more, whose weights, gradients and optimizer would take
            16 GB a billion in float32; all weights of smaller ones.
        lora_modules: names of the linear layers that get adapters.
        clips: latents the teacher makes from the prompts, ``full_steps`` steps each, where no
            ``latents`` or ``data`` are given. Consistency distillation draws from them.
        latents: a folder of `evdit_opt.distill.data.write_shards` or ``write_stream``, instead.
        data: videos with captions, instead; they are encoded once.
        seed: of the clips' noise and everything drawn.
        samples: clips to make now and then while training; None: none.
    """

    folder: Path
    stages: tuple[str, ...] = STAGES
    consistency: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=1000))
    knowledge: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=300, decay_from=150)
    )
    guidance: float = 5.0
    negative_prompt: str = ""
    full_steps: int = 50
    time_shift: float = 1.0
    first_teacher_steps: int = 4
    huber: float | None = None
    weights: KnowledgeWeights = field(default_factory=KnowledgeWeights)
    attention_only: bool = False
    lora_rank: int | Literal["auto"] | None = "auto"
    lora_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    clips: int = 64
    latents: Path | None = None
    data: VideoData | None = None
    seed: int = 0
    samples: SampleConfig | None = None

    def __post_init__(self) -> None:
        for name in ("folder", "latents"):
            value = getattr(self, name)
            if not isinstance(value, Path) and (name, value) != ("latents", None):
                raise DistillationError(f"expected {name} to be a pathlib.Path, got {value!r}")
        for name in ("stages", "lora_modules"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
                raise DistillationError(f"expected {name} to be a tuple of names, got {value!r}")
        learns = "consistency" in self.stages
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or not self.stages or len(set(self.stages)) != len(self.stages):
            raise DistillationError(
                f"expected stages among {', '.join(STAGES)}, each once, got {self.stages!r}"
            )
        if "knowledge" in self.stages and "search" not in self.stages[: self._place("knowledge")]:
            raise DistillationError(
                f"expected search before knowledge, got {self.stages!r}: the sparse student needs "
                "a plan"
            )
        if type(self.seed) is not int or self.seed < 0:
            raise DistillationError(
                f"expected seed to be an integer of at least 0, got {self.seed!r}"
            )
        for name in ("full_steps", "first_teacher_steps", "clips"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise DistillationError(f"expected {name} to be an integer above 0, got {value!r}")
        rank = self.lora_rank
        if rank not in (None, "auto") and (type(rank) is not int or rank < 1):
            raise DistillationError(
                f"expected lora_rank to be an integer above 0, 'auto' or none, got {rank!r}"
            )
        if self.huber is not None and not self.huber > 0:
            raise DistillationError(f"expected huber above 0 or none, got {self.huber!r}")
        sparse = "search" in self.stages[: self._place("consistency")] if learns else False
        if self.knowledge.shard or (self.consistency.shard and (sparse or self.samples)):
            raise DistillationError(
                "expected shard in the consistency stage only, before the search and without "
                "samples: a model that runs under a plan, or makes clips, is not sharded"
            )
        if self.latents is not None and self.data is not None:
            raise DistillationError("expected latents or data, got both; leave one out")
        if not self.guidance >= 1:
            raise DistillationError(f"expected guidance of at least 1, got {self.guidance!r}")

    def _place(self, stage: str) -> int:
        return self.stages.index(stage)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A file of ``evdit distill``.

    Attributes:
        pipeline: 'tinywan', a pipeline's folder or a Hugging Face id.
        prompts: what to train on.
        steps: of the student.
        finetune: see `FinetuneConfig`.
        call: further arguments of the pipeline's calls, such as num_frames.
        search: settings of ``evdit_opt.Config``.
        device: where to train; None: where the pipeline is.
        dtype: of the weights; None: as loaded.
    """

    pipeline: str
    prompts: tuple[str, ...]
    steps: int
    finetune: FinetuneConfig
    call: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None


def read_config(path: Path) -> Job:
    """Read a YAML file: the fields of `Job`, and under ``finetune`` those of `FinetuneConfig`.

    ``prompts`` is a list, or the name of a file with a prompt a line; names of files are relative
    to the YAML file.

    Raises:
        DistillationError: the file cannot be read, or a field is unknown, missing or wrong.
    """
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DistillationError(f"expected a YAML file in {path}: {error}") from error
    values = _known(Job, read, str(path))
    given = _known(FinetuneConfig, values.get("finetune"), "finetune")
    for name, kind in (
        ("consistency", TrainingConfig),
        ("knowledge", TrainingConfig),
        ("weights", KnowledgeWeights),
        ("data", VideoData),
        ("samples", SampleConfig),
    ):
        if name in given:
            values_of = _known(kind, given[name], f"finetune.{name}")
            if "videos" in values_of:
                values_of["videos"] = path.parent / str(values_of["videos"])
            given[name] = _made(kind, values_of, name)
    for name in ("folder", "latents"):
        if given.get(name) is not None:
            given[name] = path.parent / str(given[name])
    for name in ("stages", "lora_modules"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    values["finetune"] = _made(FinetuneConfig, given, "finetune")
    prompts = values.get("prompts")
    if isinstance(prompts, str):
        from evdit_opt.commands.calibrate import read_prompts

        prompts = read_prompts(path.parent / prompts)
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise DistillationError(
            f"expected prompts to be a list, or a file with one a line, got {prompts!r}"
        )
    job: Job = _made(Job, values | {"prompts": tuple(prompts)}, str(path))
    if type(job.steps) is not int or job.steps < 1 or not job.prompts:
        raise DistillationError(
            f"expected steps above 0 and a prompt in {path}, got {job.steps!r} and "
            f"{len(job.prompts)} prompts"
        )
    return job


def _known(kind: type, given: object, where: str) -> dict[str, Any]:
    """The entries of a mapping, all of which are fields of ``kind``."""
    names = {item.name for item in fields(kind)}
    if not isinstance(given, Mapping) or not given.keys() <= names:
        unknown = sorted(map(str, given.keys() - names)) if isinstance(given, Mapping) else given
        raise DistillationError(
            f"expected {where} to hold {', '.join(sorted(names))}, got {unknown!r}"
        )
    found = dict(given)
    for name in ("betas", "prompts"):
        if isinstance(found.get(name), list) and kind is not Job:
            found[name] = tuple(found[name])
    return found


def _made(kind: type, values: dict[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except TypeError as error:
        raise DistillationError(
            f"expected {where} to be complete, and numbers where they belong: {error} (YAML takes "
            "1e-4 for text, 1.0e-4 is a number)"
        ) from error
