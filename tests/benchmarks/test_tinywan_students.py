"""The students that are kept, and the page that quotes what was measured of them."""

import json
from pathlib import Path

import torch

from benchmarks import tinywan_students as students
from benchmarks.tinywan_training import TRAINED_ON, load_half, parse_phase
from evdit_opt.demo.tinywan import load_tinywan
from evdit_opt.demo.train_denoiser import Recipe

ROOT = Path(__file__).parents[2]


def test_the_page_quotes_the_committed_result() -> None:
    page = (ROOT / students.PAGE).read_text()
    result = json.loads((ROOT / students.OUTPUT).read_text())
    assert students.quote(page, result) == page
    assert students.BLOCK.search(page) is not None


def test_the_kept_students_are_three_different_tinywans() -> None:
    """And each still draws, in a single call: finite, and other numbers than the next one."""
    pipe = load_tinywan()
    said = []
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 8, 3, 8, 8, generator=generator), torch.ones(1, 4, 64)
    for name in (None, "tinywan_6_steps", "tinywan_6_steps_sparse"):
        if name is not None:
            load_half(pipe.transformer, ROOT / "benchmarks/students" / f"{name}.safetensors")
        with torch.no_grad():
            said.append(pipe.transformer(sample, torch.full((1,), 900.0), text)[0])
    assert all(bool(each.isfinite().all()) for each in said)
    assert not any(torch.allclose(said[i], said[i - 1], atol=1e-3) for i in range(3))


def test_tinywans_samples_are_those_of_its_recipe() -> None:
    """The shipped weights' run ended at step 7450, docs/tinywan/log.jsonl says so."""
    lines = (ROOT / "docs/tinywan/log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    last = max(record["step"] for record in records if record["stage"] == "denoiser")
    done, total = 0, 0
    for phase in Recipe().phases:
        until = min(phase.until, last)
        total += (until - done) * phase.batch
        done = until
    assert total == TRAINED_ON


def test_a_phase_is_read() -> None:
    phase = parse_phase("500:3-5:8:5e-4:250")
    assert (phase.steps, phase.frames, phase.batch) == (500, (3, 5), 8)
    assert (phase.rate, phase.decay_from) == (5e-4, 250)
