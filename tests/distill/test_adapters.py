"""LoRA on a small Wan: no change at first; only adapters train, and they are what is saved."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from evdit_opt.demo.tinywan import build_transformer
from evdit_opt.distill.adapters import (
    LARGE,
    add_lora,
    load_weights,
    lora_rank_for,
    save_weights,
    trained_weights,
)
from evdit_opt.errors import DistillationError


def small() -> nn.Module:
    torch.manual_seed(0)
    model = build_transformer(width=32, layers=1)
    nn.init.normal_(model.proj_out.weight)  # zero as built, and nothing would show
    return model


def say(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    video, text = torch.randn(1, 8, 2, 4, 4, generator=generator), torch.ones(1, 3, 64)
    with torch.no_grad():
        return model(video, torch.full((1,), 500.0), text, return_dict=False)[0]


def test_adapters_train_alone_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = small()
    before = say(model)
    count = add_lora(model, 4, ("to_q", "to_out.0"), seed=0)
    assert torch.equal(say(model), before)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == set(trained_weights(model))
    assert count == 2 * 2 * 4 * (32 + 32)  # two attentions, two layers each, two matrices
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.1)
    after = say(model)
    assert not torch.equal(after, before)
    digest = save_weights(model, tmp_path / "weights.safetensors")
    assert len(digest) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    other = small()
    add_lora(other, 4, ("to_q", "to_out.0"), seed=9)
    load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(say(other), after)


def test_adapters_begin_the_same_for_a_seed_and_leave_torchs_alone() -> None:
    one, two = small(), small()
    state = torch.random.get_rng_state()
    for model in (one, two):
        add_lora(model, 2, ("to_q",), seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in trained_weights(one).items():
        assert torch.equal(value, trained_weights(two)[name])


@pytest.mark.parametrize(
    ("numbers", "wanted", "rank"),
    [
        (LARGE, "auto", 32),
        (LARGE - 1, "auto", None),
        (LARGE, None, None),
        (LARGE, 4, 4),
        (100, 4, 4),
    ],
)
def test_large_models_get_adapters_unless_told_otherwise(
    numbers: int, wanted: int | str | None, rank: int | None
) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(numbers, device="meta"))
    assert lora_rank_for(model, wanted) == rank


def test_adapters_are_float32_in_a_bfloat16_model() -> None:
    """A weight of size 1 that is asked to move by 1e-4 would stay where it is."""
    model = small().to(torch.bfloat16)
    add_lora(model, 2, ("to_q",), seed=0)
    assert {v.dtype for v in trained_weights(model).values()} == {torch.float32}
    layer = model.blocks[0].attn1.to_q
    given = torch.randn(1, 3, layer.in_features, dtype=torch.bfloat16)
    assert layer(given).dtype == torch.bfloat16


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(small(), path)
    with pytest.raises(DistillationError, match="differ"):
        load_weights(build_transformer(width=64, layers=1), path)
    path.write_bytes(b"nothing")
    with pytest.raises(DistillationError, match="cannot read"):
        load_weights(small(), path)
    with pytest.raises(DistillationError, match="lora_rank=None"):
        add_lora(nn.Linear(2, 2), 2, ("x",), seed=0)


def test_a_full_disk_leaves_the_weights_that_were_there(tmp_path: Path, full_disk) -> None:
    path = tmp_path / "weights.safetensors"
    before = save_weights(small(), path)
    full_disk(8192)
    with pytest.raises(DistillationError, match=r"weights.*File too large.*make room"):
        save_weights(small(), path)
    full_disk(2**40)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]
