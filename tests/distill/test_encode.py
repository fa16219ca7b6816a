"""Videos become TinyWan's latents and text, once, scaled as the pipeline itself scales them."""

import logging
from functools import wraps
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from evdit_opt.demo.clips import draw_clip, sample_clip
from evdit_opt.demo.tinywan import load_tinywan
from evdit_opt.distill import data, encode
from evdit_opt.distill.conditions import Conditions
from evdit_opt.distill.data import LatentShards
from evdit_opt.distill.encode import (
    Encoder,
    VideoData,
    check_videos,
    encode_videos,
    latent_scale,
)
from evdit_opt.errors import DistillationError

CALL = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16}
CAPTIONS = ("a red circle moving left", "a blue square moving up", "a green plus moves down")


@pytest.fixture(scope="module")
def pipe():
    return load_tinywan()


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three real mp4s of 12 frames, 40 x 48 pixels."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        video = (255 * draw_clip(sample_clip(number))[:12, :40, :48]).astype(np.uint8)
        iio.imwrite(folder / f"{number}.mp4", video, fps=12, codec="libx264", macro_block_size=8)
        (folder / f"{number}.txt").write_text(caption)
    return folder


def test_a_clip_comes_back_from_its_latent() -> None:
    """What the autoencoder makes of a clip, decoded by the pipeline's formulas, is that clip.

    TinyWan's own mean and deviation are 0 and 1, where any formula would do, so it is given others.
    """
    pipe = load_tinywan()
    pipe.vae.register_to_config(
        latents_mean=[0.1 * n for n in range(8)], latents_std=[3 + 0.2 * n for n in range(8)]
    )
    pixels = np.round(255 * draw_clip(sample_clip(3))).astype(np.uint8)
    encoder = Encoder(pipe, {"num_frames": 33, "height": 80, "width": 80})  # checks its scale too
    latent = encoder.latent(pixels)

    def psnr(given: torch.Tensor) -> float:
        mean, std = (
            torch.tensor(pipe.vae.config[name]).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        with torch.no_grad():
            video = pipe.vae.decode(given[None] * std + mean).sample[0]
        wanted = torch.from_numpy(pixels).permute(3, 0, 1, 2) / 127.5 - 1
        return -10 * float(((video.clamp(-1, 1) - wanted) / 2).square().mean().log10())

    assert psnr(latent) > 30  # the autoencoder alone reaches 32 dB on this clip
    assert psnr(latent / encoder.scale + encoder.shift) < 25  # latents that were not scaled


def test_text_is_the_pipelines_own(tmp_path: Path, pipe, clips: Path) -> None:
    shards = encode_videos(pipe, VideoData(videos=clips), tmp_path / "out", CALL)
    assert sorted(shards.captions) == sorted(CAPTIONS)
    sample, timestep = torch.randn(3, 8, 5, 8, 8), torch.tensor([900.0, 500.0, 100.0])
    fresh = Conditions(pipe, ["", *CAPTIONS], CALL)
    stored = Conditions(pipe, [""], CALL, shards.texts)
    assert set(stored.of) == {""}
    with torch.no_grad():
        one, other = (
            conditions.bind(pipe.transformer, CAPTIONS)(sample, timestep)
            for conditions in (fresh, stored)
        )
    assert torch.equal(one, other)


def test_an_interrupted_encoding_goes_on(tmp_path: Path, pipe, clips, monkeypatch) -> None:
    """Killed anywhere, started again: shards equal bit for bit, none encoded twice."""
    monkeypatch.setattr(encode, "write_shards", _by_two)
    straight = encode_videos(pipe, VideoData(videos=clips), tmp_path / "straight", CALL)
    read = encode.read_clip
    monkeypatch.setattr(encode, "read_clip", lambda *given: _die_at(read, *given))
    with pytest.raises(KeyboardInterrupt):
        encode_videos(pipe, VideoData(videos=clips), tmp_path / "killed", CALL)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["00000000.safetensors"]
    again = []
    monkeypatch.setattr(encode, "read_clip", lambda *g: (again.append(g[0].name), read(*g))[1])
    resumed = encode_videos(pipe, VideoData(videos=clips), tmp_path / "killed", CALL)
    assert again == ["2.mp4"]
    assert torch.equal(resumed.take(range(3)), straight.take(range(3)))
    assert resumed.captions == straight.captions
    for caption in CAPTIONS:
        for name, value in straight.texts[caption].items():
            assert torch.equal(value, resumed.texts[caption][name])


def _by_two(*given: object, **named: object) -> None:
    data.write_shards(*given, **named, per_shard=2)


def _one_by_one(*given: object, **named: object) -> None:
    data.write_shards(*given, **named, per_shard=1)


def _die_at(read, path: Path, *given: object) -> np.ndarray:
    if path.name == "2.mp4":
        raise KeyboardInterrupt
    return read(path, *given)


def test_what_cannot_be_used_is_named_and_counted(tmp_path, pipe, clips, caplog) -> None:
    iio.imwrite(clips / "short.gif", np.zeros((4, 32, 32, 3), np.uint8), duration=100)
    (clips / "broken.mp4").write_bytes(b"nonsense" * 99)
    for name in ("short", "broken"):
        (clips / f"{name}.txt").write_text("a red circle")
    iio.imwrite(clips / "untold.gif", np.zeros((12, 32, 32, 3), np.uint8), duration=100)
    found = check_videos(pipe, VideoData(videos=clips), CALL)
    assert (found.usable, len(found.skipped)) == (3, 3)
    assert found.seconds > 0
    latent, text = 4 * 8 * 5 * 8 * 8, 4 * 16 * 64
    assert found.disk_gib == pytest.approx(3 * (latent + text) / 2**30)
    for _ in range(2):  # encoding, and reading what is encoded
        caplog.clear()
        with caplog.at_level(logging.INFO, "evdit_opt"):
            shards = encode_videos(pipe, VideoData(videos=clips), tmp_path / "out", CALL)
        assert len(shards) == 3
        for words in ("short.gif to have at least 9", "broken.mp4, cannot read", "untold.txt"):
            assert sum(words in line for line in caplog.messages) == 1
        assert "3 videos" in caplog.messages[-1]
        assert "3 left out" in caplog.messages[-1]


def test_nothing_left_is_one_error(tmp_path: Path, pipe, clips: Path) -> None:
    for path in clips.glob("*.mp4"):
        path.write_bytes(b"")
    with pytest.raises(DistillationError, match=r"found none; left out: .*0\.mp4"):
        encode_videos(pipe, VideoData(videos=clips), tmp_path / "out", CALL)
    with pytest.raises(DistillationError, match=r"left out all: .*0\.mp4"):
        check_videos(pipe, VideoData(videos=clips), CALL)


def test_other_videos_do_not_mix(tmp_path: Path, pipe, clips: Path) -> None:
    out = tmp_path / "out"
    encode_videos(pipe, VideoData(videos=clips), out, CALL)
    with pytest.raises(DistillationError, match="to be made of"):
        encode_videos(pipe, VideoData(videos=clips, rate=12), out, CALL)
    (clips / "1.txt").write_text("a yellow square")
    with pytest.raises(DistillationError, match=r"1\.mp4.* now .*yellow.*encode its clips again"):
        encode_videos(pipe, VideoData(videos=clips), out, CALL)
    (clips / "1.txt").write_text(CAPTIONS[1])
    (clips / "2.txt").unlink()
    with pytest.raises(DistillationError, match=r"2\.mp4"):
        encode_videos(pipe, VideoData(videos=clips), out, CALL)


def test_a_full_disk_keeps_what_is_there(tmp_path, pipe, clips, monkeypatch, full_disk) -> None:
    """Of the first clip one frame is left, so that its shard fits."""
    monkeypatch.setattr(encode, "write_shards", _one_by_one)
    whole, made = Encoder.latent, []

    def latent(self: Encoder, pixels: np.ndarray) -> torch.Tensor:
        made.append(whole(self, pixels))
        return made[-1][:, :1] if len(made) == 1 else made[-1]

    monkeypatch.setattr(Encoder, "latent", latent)
    full_disk(8192)
    with pytest.raises(DistillationError, match=r"File too large.*1 latents are kept"):
        encode_videos(pipe, VideoData(videos=clips), tmp_path / "out", CALL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000000.safetensors"]
    assert len(LatentShards(tmp_path / "out")) == 1


class NeverDecodes(WanPipeline):
    """One whose autoencoder nobody calls, so that nothing is known about its latents."""

    @wraps(WanPipeline.__call__)
    def __call__(self, *given: object, **named: object) -> object:
        return super().__call__(*given, **{**named, "output_type": "latent"})


def test_a_scale_that_is_not_known_is_refused(pipe) -> None:
    class Nameless:
        config: dict = {}  # noqa: RUF012

    with pytest.raises(DistillationError, match="found neither"):
        latent_scale(Nameless())
    shift, scale = latent_scale(type("Kl", (), {"config": {"scaling_factor": 0.5}})())
    assert (float(shift), float(scale)) == (0.0, 0.5)
    fitting = load_tinywan()
    fitting.vae.register_to_config(scaling_factor=0.5)  # that Wan's pipeline does not look at
    with pytest.raises(DistillationError, match="it does something else"):
        Encoder(fitting, CALL)
    assert "decode" not in vars(fitting.vae)
    silent = load_tinywan()
    silent.__class__ = NeverDecodes
    with pytest.raises(DistillationError, match="it does something else"):
        Encoder(silent, CALL)


def test_a_size_that_the_pipeline_does_not_make_is_refused(pipe) -> None:
    encoder = Encoder(pipe, CALL)
    with pytest.raises(DistillationError, match="set num_frames, height and width"):
        encoder.latent(np.zeros((13, 32, 32, 3), np.uint8))
    with pytest.raises(DistillationError, match="under call"):
        Encoder(pipe, {**CALL, "height": None})
