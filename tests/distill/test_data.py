"""Latents on disk: written whole, made once, and what is wrong with them is said."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evdit_opt.distill.data import LatentShards, write_shards
from evdit_opt.errors import DistillationError


def make(number: int) -> tuple[torch.Tensor, str]:
    return torch.full((1, 2, 2, 2), float(number)), f"clip {number}"


def test_an_interrupted_encoding_goes_on_after_the_last_shard(tmp_path: Path) -> None:
    done: list[int] = []

    def dying(number: int) -> tuple[torch.Tensor, str]:
        if number == 5:
            raise KeyboardInterrupt
        done.append(number)
        return make(number)

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, 7, dying, per_shard=2)
    assert len(list(tmp_path.iterdir())) == 2
    again: list[int] = []
    write_shards(tmp_path, 7, lambda number: (again.append(number), make(number))[1], per_shard=2)
    assert again == [4, 5, 6]
    shards = LatentShards(tmp_path)
    assert len(shards) == 7
    assert shards.captions == [f"clip {number}" for number in range(7)]
    assert shards.take([6, 0, 3])[:, 0, 0, 0, 0].tolist() == [6.0, 0.0, 3.0]


def test_every_epoch_shows_every_clip_in_another_order(tmp_path: Path) -> None:
    write_shards(tmp_path, 9, make, per_shard=4)
    shards = LatentShards(tmp_path)
    first, second = ([shards.shuffled(9 * epoch + n, 3) for n in range(9)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(9))
    assert first != second


def test_more_clips_may_be_asked_for_later(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, make, per_shard=2)
    write_shards(tmp_path, 5, make, per_shard=2)
    assert LatentShards(tmp_path).captions == [f"clip {number}" for number in range(5)]


def test_latents_of_something_else_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, 2, make, made_of={"seed": "0"})
    with pytest.raises(DistillationError, match="choose another folder"):
        write_shards(tmp_path, 2, make, made_of={"seed": "1"})


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DistillationError, match="found none"):
        LatentShards(tmp_path)
    write_shards(tmp_path, 2, make)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DistillationError, match="encode again"):
        LatentShards(tmp_path)
    save_file({"latents": torch.zeros(3, 1)}, path, {"captions": '["one"]', "made_of": ""})
    with pytest.raises(DistillationError, match="a caption for each of 3"):
        LatentShards(tmp_path)


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    write = safetensors.torch.save_file

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        write(tensors, path, metadata)
        if "00000002" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DistillationError, match=r"No space left.*2 latents are kept"):
        write_shards(tmp_path, 4, make, per_shard=2)
    assert len(LatentShards(tmp_path)) == 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
