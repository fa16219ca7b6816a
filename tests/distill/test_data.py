"""Latents on disk: written whole, made once, and what is wrong with them is said."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evdit_opt.distill.data import LatentShards, Sample, SkipClip, write_shards, write_stream
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


def test_an_iterator_goes_on_too(tmp_path: Path) -> None:
    taken: list[int] = []

    def stream(count: int):
        for number in range(count):
            taken.append(number)
            yield Sample(
                *make(number), {"encoder_hidden_states": torch.full((1, 3), float(number))}
            )

    def dying():
        yield from stream(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(tmp_path, dying(), per_shard=2)
    first = (tmp_path / "00000000.safetensors").stat().st_mtime_ns
    write_stream(tmp_path, stream(7), per_shard=2)
    assert (tmp_path / "00000000.safetensors").stat().st_mtime_ns == first
    assert taken == [*range(5), *range(7)]
    shards = LatentShards(tmp_path)
    assert shards.take([6, 0])[:, 0, 0, 0, 0].tolist() == [6.0, 0.0]
    assert set(shards.texts) == {f"clip {number}" for number in range(7)}
    for number in (0, 3, 6):
        text = shards.texts[f"clip {number}"]["encoder_hidden_states"]
        assert text.tolist() == [[number] * 3]
    with pytest.raises(DistillationError, match="others"):
        write_stream(tmp_path, [(make(1))] * 2, per_shard=2)


def test_clips_are_left_out_for_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def choosy(number: int) -> tuple[torch.Tensor, str]:
        if number in (0, 1, 4):
            raise SkipClip(f"clip {number} is too short")
        return make(number)

    for _ in range(2):
        caplog.clear()
        write_shards(tmp_path, 5, choosy, per_shard=2)
        assert [f"clip {n} is too short" in " ".join(caplog.messages) for n in (0, 1, 4)] == [
            True
        ] * 3
    shards = LatentShards(tmp_path)
    assert shards.captions == ["clip 2", "clip 3"]
    assert shards.skipped == [f"clip {number} is too short" for number in (0, 1, 4)]
    assert shards.take([1])[0, 0, 0, 0, 0] == 3
    write_shards(tmp_path / "none", 2, choosy)
    with pytest.raises(DistillationError, match=r"found none; left out: clip 0"):
        LatentShards(tmp_path / "none")


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


def test_a_damaged_shard_is_not_encoded_over(tmp_path: Path) -> None:
    write_shards(tmp_path, 4, make, per_shard=2)
    (tmp_path / "00000002.safetensors").write_bytes(b"cut")
    with pytest.raises(DistillationError, match=r"00000002.*remove the file and encode again"):
        write_shards(tmp_path, 4, make, per_shard=2)


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
