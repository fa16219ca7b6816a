"""The stages in a line on TinyWan at a small size: either order, resumed, saved, restored."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from evdit_opt import Config, FewStepScheduler, Plan, apply_plan, optimize
from evdit_opt.apply import is_optimized
from evdit_opt.demo.clips import draw_clip, sample_clip
from evdit_opt.demo.tinywan import load_tinywan
from evdit_opt.distill import encode, pipeline
from evdit_opt.distill.checkpoint import load_state
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.data import write_shards
from evdit_opt.distill.encode import VideoData
from evdit_opt.distill.loop import TrainingConfig
from evdit_opt.distill.pipeline import Finetuning, finetune
from evdit_opt.distill.rehearsal import rehearse
from evdit_opt.distill.saved import restore_finetuned
from evdit_opt.errors import DistillationError, PlanMismatchError
from evdit_opt.masks import Rule
from evdit_opt.plan import PLAN_FILE
from tests.models.toy_dit import make_plan
from tests.short_tinywan import short_tinywan

CALL = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16}
PROMPTS = ("a red circle moving left", "a blue square moving up", "a green plus moves down")
SEARCH = Config(
    density=0.5, references=(0, 1), windows=(0,), weightings=("none",), spacings=("paper",),
    min_tokens=0, verify_prompts=0, trial_prompts=1, reuse=False, inner="eager", progress=False,
    pipe_kwargs=CALL,
)  # fmt: skip
SHORT = TrainingConfig(steps=3, batch=2, learning_rate=1e-3, warmup=1, save_every=1)


def settings(folder: Path, **changes: object) -> FinetuneConfig:
    usual = FinetuneConfig(
        folder=folder, consistency=SHORT, knowledge=SHORT, guidance=2.0, full_steps=6, clips=2
    )
    return replace(usual, **changes)


def clip(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    call = {**CALL, "guidance_scale": 1.0, "num_inference_steps": 50}
    return pipe(PROMPTS[0], generator=generator, output_type="latent", **call).frames


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order, whoever else uses the machine
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "rank",
    [pytest.param(None, marks=pytest.mark.nightly, id="all weights"), pytest.param(2, id="lora")],
)
def test_optimize_trains_saves_and_restores_bit_for_bit(tmp_path: Path, rank: int | None) -> None:
    pipe = short_tinywan()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    config = settings(tmp_path, lora_rank=rank)
    assert optimize(pipe, PROMPTS, SEARCH, steps=2, finetune=config) is pipe
    assert isinstance(pipe.scheduler, FewStepScheduler)
    assert is_optimized(pipe.transformer)
    made = clip(pipe)
    assert len(pipe.scheduler.timesteps) == 2

    plan = Plan.load(tmp_path / "result" / PLAN_FILE)
    assert plan.finetune is not None
    assert (plan.finetune.steps, plan.finetune.lora_rank) == (2, rank or 0)
    assert "guidance_scale=1" in plan.describe()
    other = short_tinywan()
    restored = restore_finetuned(other, tmp_path / "result", inner="eager")
    assert restored == plan
    assert torch.equal(clip(other), made)
    with pytest.raises(PlanMismatchError, match="load them before the plan"):
        apply_plan(short_tinywan(), plan, inner="eager")
    if rank is None:  # as any other pipeline; diffusers cannot load one with adapters in it
        pipe.save_pretrained(tmp_path / "whole")
        loaded = WanPipeline.from_pretrained(tmp_path / "whole")
        assert torch.equal(clip(apply_plan(loaded, plan, inner="eager")), made)
    changed = pipe.transformer.state_dict()
    base = {name for name in before if name in changed}
    assert all(torch.equal(changed[name], before[name]) for name in base) is (rank is not None)


def test_videos_are_what_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded once: the second run, after a kill, reads neither a video nor a caption."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for number, caption in enumerate(("a yellow circle moving up", "a red plus moving left")):
        video = (255 * draw_clip(sample_clip(number))[:12]).astype(np.uint8)
        iio.imwrite(clips / f"{number}.mp4", video, fps=12)
        (clips / f"{number}.txt").write_text(caption)
    config = settings(
        tmp_path / "run", stages=("consistency",), data=VideoData(videos=clips), clips=99
    )
    first = short_tinywan()
    finetune(first, PROMPTS, config, steps=2, search=SEARCH)
    shutil.rmtree(tmp_path / "run" / "1-consistency")

    def never(*given: object) -> None:
        raise AssertionError("a clip that is encoded was read again")

    monkeypatch.setattr(encode, "read_clip", never)
    second = short_tinywan()
    said: list[str] = []
    text = second.encode_prompt
    second.encode_prompt = lambda *g, **n: (
        said.append(n.get("prompt", g and g[0])),
        text(*g, **n),
    )[1]
    finetune(second, PROMPTS, config, steps=2, search=SEARCH)
    assert not any("yellow" in str(prompt) for prompt in said)
    changed = short_tinywan().transformer.state_dict()
    for name, value in first.transformer.state_dict().items():
        assert torch.equal(value, second.transformer.state_dict()[name])
    assert any(not torch.equal(v, changed[n]) for n, v in first.transformer.state_dict().items())


@pytest.mark.nightly  # tests/distill/test_processes.py is the quick one
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """One encodes and writes; both train on the global batch that one process would have."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(3):
        video = (255 * draw_clip(sample_clip(number))[:12]).astype(np.uint8)
        iio.imwrite(clips / f"{number}.mp4", video, fps=12)
        (clips / f"{number}.txt").write_text(sample_clip(number).caption)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    script = Path(__file__).with_name("whole_run.py")
    curves, start = {}, load_tinywan().transformer.state_dict()
    for name, processes, batch, shard in (("one", 1, 2, 0), ("two", 2, 1, 0), ("shards", 2, 1, 1)):
        given = [str(tmp_path / name), str(clips), str(batch), str(shard), "0"]
        command = [*launch, str(processes), str(script), *given]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        read = (tmp_path / f"{name}.read").read_text().splitlines()
        assert sorted(read) == ["0.mp4", "1.mp4", "2.mp4"]
        restored = load_tinywan()
        restore_finetuned(restored, tmp_path / name / "result")
        learned = restored.transformer.state_dict()
        assert any(not torch.equal(value, start[key]) for key, value in learned.items())
        lines = (tmp_path / name / "1-consistency/log.jsonl").read_text().splitlines()
        curves[name] = [json.loads(line) for line in lines]
        assert [record["samples"] for record in curves[name]] == [2, 4, 6, 8, 10, 12]
    # Before the first update: outputs of size 1 differ by the order of 64 products, the loss is the
    # mean square of errors of about 0.1.
    first = curves["one"][0]["loss"]
    assert first > 0.1**2
    for name in ("two", "shards"):
        assert abs(curves[name][0]["loss"] - first) < 2 * 64 * 2**-23 * first / 0.1


@pytest.mark.nightly
def test_the_other_order_trains_the_sparse_model_for_few_steps(tmp_path: Path) -> None:
    pipe = short_tinywan()
    order = ("search", "knowledge", "consistency")
    plan = finetune(pipe, PROMPTS, settings(tmp_path, stages=order), steps=2, search=SEARCH)
    assert plan is not None
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "1-search", "2-knowledge", "3-consistency", "latents", "result",
    ]  # fmt: skip
    assert not is_optimized(pipe.transformer)


def test_a_killed_run_goes_on_at_its_stage_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = ("consistency",)
    straight, killed = short_tinywan(), short_tinywan()
    finetune(straight, PROMPTS, settings(tmp_path / "a", stages=stages), steps=2, search=SEARCH)

    train = pipeline.train

    def until_two(*given: object) -> Iterator[dict]:
        for record in train(*given):
            yield record
            if record["step"] == 2:
                raise KeyboardInterrupt

    config = settings(tmp_path / "b", stages=stages)
    monkeypatch.setattr(pipeline, "train", until_two)
    with pytest.raises(KeyboardInterrupt):
        finetune(killed, PROMPTS, config, steps=2, search=SEARCH)
    monkeypatch.undo()
    assert load_state(tmp_path / "b" / "1-consistency")["step"] == 2
    again = short_tinywan()
    finetune(again, PROMPTS, config, steps=2, search=SEARCH)
    for one, other in zip(
        straight.transformer.parameters(), again.transformer.parameters(), strict=True
    ):
        assert torch.equal(one, other)

    def never(*given: object) -> Iterator[dict]:
        raise AssertionError("a stage that is done was trained again")

    monkeypatch.setattr(pipeline, "train", never)
    for changed, steps in ((config, 3), (replace(config, guidance=3.0), 2)):
        with pytest.raises(
            DistillationError, match=r"begun with, got others \((steps 2, now 3|gui)"
        ):
            finetune(short_tinywan(), PROMPTS, changed, steps=steps, search=SEARCH)
    third = short_tinywan()
    finetune(third, PROMPTS, config, steps=2, search=SEARCH)
    assert torch.equal(clip(third), clip(again))


def test_a_rehearsal_changes_nothing(tmp_path: Path) -> None:
    pipe = short_tinywan()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    run = Finetuning(pipe, PROMPTS, settings(tmp_path), 2, SEARCH)
    [found] = rehearse(run)
    assert (found.stage, found.samples) == ("consistency", 6)
    assert found.trained == sum(value.numel() for value in pipe.transformer.parameters())
    assert found.training_gib == pytest.approx(3 * 4 * found.trained / 2**30)
    assert found.seconds > 0
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, before[name])
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_computes_as_the_training_will(tmp_path: Path) -> None:
    stage = replace(SHORT, bf16=True, checkpointing=True, average=0.9)
    pipe = short_tinywan()
    run = Finetuning(
        pipe, PROMPTS, settings(tmp_path, stages=("consistency",), consistency=stage), 2, SEARCH
    )
    seen = []
    pipe.transformer.blocks[0].attn1.to_q.register_forward_hook(
        lambda *given: seen.append((given[-1].dtype, pipe.transformer.is_gradient_checkpointing))
    )
    [found] = rehearse(run)
    assert set(seen) == {(torch.bfloat16, True)}
    assert not pipe.transformer.is_gradient_checkpointing
    assert found.training_gib == pytest.approx(4 * 4 * found.trained / 2**30)


def test_without_a_consistency_stage_the_wrapped_solver_steps(tmp_path: Path) -> None:
    """What was not trained for segments, nor to be its own guidance, is not called so."""
    pipe = short_tinywan()
    run = Finetuning(pipe, PROMPTS, settings(tmp_path, stages=("search", "knowledge")), 2, SEARCH)
    run.finish()
    other = short_tinywan()
    restore_finetuned(other, tmp_path / "result")
    for scheduler in (pipe.scheduler, other.scheduler):
        assert (scheduler.config.steps, scheduler.config.segments) == (2, None)
    Finetuning(short_tinywan(), PROMPTS, settings(tmp_path), 2, SEARCH).finish()
    restored = short_tinywan()
    restore_finetuned(restored, tmp_path / "result")
    assert restored.scheduler.config.segments == 2


def test_the_student_is_sampled_at_the_points_that_it_is_trained_at(tmp_path: Path) -> None:
    run = Finetuning(short_tinywan(), PROMPTS, settings(tmp_path, time_shift=2.0), 3, SEARCH)
    segments = run._setting(3).segments
    run.few.set_timesteps(50)
    edges = list(segments.edges[:-1])
    assert segments.timesteps[edges].tolist() == run.few.timesteps.tolist()
    plain = Finetuning(short_tinywan(), PROMPTS, settings(tmp_path), 3, SEARCH)._setting(3)
    assert plain.segments.edges != segments.edges


def test_only_the_sites_are_trained_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = ("search", "knowledge")
    for only in (False, True):
        config = settings(tmp_path / str(only), stages=stages, attention_only=only)
        run = Finetuning(short_tinywan(), PROMPTS, config, 2, SEARCH)
        run.plan, every = make_plan(run.model, {"blocks.1.attn1": Rule(1)}), run.trained
        with run.losses(1):
            names = {n for n, value in run.model.named_parameters() if value.requires_grad}
            assert all(name.startswith("blocks.1.attn1.") for name in names) is only
            assert names
        assert run.trained == every
    assert "compiled in parts" not in caplog.text  # nothing stops in the midst of a graph


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    pipe = short_tinywan()
    finetune(pipe, PROMPTS, settings(tmp_path, stages=("consistency",)), steps=2, search=SEARCH)
    weights = tmp_path / "result" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DistillationError, match="copy the whole folder"):
        restore_finetuned(short_tinywan(), tmp_path / "result")
    with pytest.raises(DistillationError, match="'result' folder"):
        restore_finetuned(short_tinywan(), tmp_path)


def test_what_cannot_be_trained_is_said_first(tmp_path: Path) -> None:
    pipe = short_tinywan()
    with pytest.raises(DistillationError, match="prompt"):
        Finetuning(pipe, (), settings(tmp_path), 2, SEARCH)
    one = Finetuning(short_tinywan(), PROMPTS[0], settings(tmp_path), 2, SEARCH)
    assert one.prompts == PROMPTS[:1]  # not its letters
    with pytest.raises(DistillationError, match="pipeline"):
        Finetuning(pipe.transformer, PROMPTS, settings(tmp_path), 2, SEARCH)
    with pytest.raises(DistillationError, match="set lora_modules"):
        Finetuning(pipe, PROMPTS, settings(tmp_path, lora_rank=2, lora_modules=("no",)), 2, SEARCH)
    checkpointed = settings(tmp_path, knowledge=replace(SHORT, checkpointing=True))
    with pytest.raises(DistillationError, match="search with reuse=False"):
        Finetuning(pipe, PROMPTS, checkpointed, 2, replace(SEARCH, reuse=True))
    Finetuning(pipe, PROMPTS, checkpointed, 2, SEARCH)
    pipe.transformer.enable_gradient_checkpointing()
    with pytest.raises(DistillationError, match="search with reuse=False"):
        Finetuning(pipe, PROMPTS, settings(tmp_path), 2, replace(SEARCH, reuse=True))
    for given, message in (
        ({"knowledge": replace(SHORT, shard=True)}, "shard in the consistency stage only"),
        ({"consistency": replace(SHORT, shard=True)}, "the only one; launch with torchrun"),
        ({"latents": tmp_path / "none"}, "found none"),
        ({"data": VideoData(videos=tmp_path / "none")}, "a folder of videos"),
    ):
        with pytest.raises(DistillationError, match=message):
            Finetuning(pipe, PROMPTS, settings(tmp_path, **given), 2, SEARCH)
    write_shards(tmp_path / "small", 1, lambda n: (torch.zeros(8, 1, 8, 8), "a"))
    with pytest.raises(DistillationError, match=r"latents \[8, 5, 8, 8\] .*got \[8, 1, 8, 8\]"):
        Finetuning(pipe, PROMPTS, settings(tmp_path, latents=tmp_path / "small"), 2, SEARCH)
    half = short_tinywan().to(torch.bfloat16)
    with pytest.raises(DistillationError, match="weights in float32 to train all"):
        Finetuning(half, PROMPTS, settings(tmp_path), 2, SEARCH)
    Finetuning(half, PROMPTS, settings(tmp_path, lora_rank=2), 2, SEARCH)
    with pytest.raises(DistillationError, match=r"without adapters.*fuse_lora\(\)"):
        Finetuning(half, PROMPTS, settings(tmp_path), 2, SEARCH)
    with pytest.raises(DistillationError, match="steps and finetune together"):
        optimize(pipe, PROMPTS, SEARCH, steps=2)
