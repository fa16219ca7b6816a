"""A folder of videos: found with their captions, cut to size; what cannot be used is named."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from evdit_opt.distill.videos import check_clip, list_videos, read_clip
from evdit_opt.errors import DistillationError, VideoError

CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}


def grey(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame n is grey of 5 n + 20, bright beside its middle square."""
    video = np.full((frames, height, width, 3), 255, np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    shades = 5 * np.arange(frames, dtype=np.uint8) + 20
    video[:, top : top + side, left : left + side] = shades[:, None, None, None]
    return video


def write(path: Path, video: np.ndarray, caption: str | None = "a clip") -> Path:
    if path.suffix == ".gif":
        iio.imwrite(path, video, duration=100)
    elif path.suffix:
        iio.imwrite(path, video, fps=10, codec=CODECS[path.suffix])
    else:
        path.mkdir()
        for number, picture in enumerate(video):
            iio.imwrite(path / f"frame{number}.png", picture)
    if caption is not None:
        path.with_name(f"{path.stem}.txt").write_text(caption)
    return path


@pytest.mark.parametrize("kind", [".mp4", ".webm", ".avi", ".gif", ""])
def test_the_middle_of_a_video_in_time_and_space(tmp_path: Path, kind: str) -> None:
    """Of 13 frames the frames 4 to 8; beside the square nothing is left of the bright border."""
    clip = read_clip(write(tmp_path / f"one{kind}", grey(13)), 5, 32, 32)
    assert (clip.shape, clip.dtype) == ((5, 32, 32, 3), np.uint8)
    centre = clip[:, 12:20, 12:20].mean((1, 2, 3))
    # Neighbours differ by 5: a codec that is off by less than half of it shows the right frame.
    assert np.abs(centre - (5 * np.arange(4, 9) + 20)).max() < 2.5
    assert clip[:, :, 2:-2].max() < 130


def test_pictures_of_the_right_size_are_taken_as_they_are(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 256, (12, 16, 24, 3), dtype=np.uint8)
    assert np.array_equal(read_clip(write(tmp_path / "one", video), 12, 16, 24), video)


@pytest.mark.parametrize("kind", [".mp4", ".gif"])
def test_a_rate_takes_the_nearest_frames(tmp_path: Path, kind: str) -> None:
    """10 frames a second, of which 4 are asked for: every 2.5th, 11 of 13 from the second on."""
    clip = read_clip(write(tmp_path / f"one{kind}", grey(13)), 5, 32, 32, rate=4)
    shades = clip[:, 12:20, 12:20].mean((1, 2, 3))
    assert np.abs(shades - (5 * (1 + np.array([0, 2, 5, 8, 10])) + 20)).max() < 2.5


@pytest.mark.parametrize("layout", ["beside", "metadata.jsonl", "metadata.csv", "captions.csv"])
def test_captions_are_found(tmp_path: Path, layout: str) -> None:
    rows = {"a.mp4": "red, moving", "b.gif": "blue", "c": "green"}
    for name, text in rows.items():
        write(tmp_path / name, grey(3), f"{text}\n" if layout == "beside" else None)
    if layout.endswith(".jsonl"):
        lines = [json.dumps({"file_name": n, "text": t, "more": 1}) for n, t in rows.items()]
        (tmp_path / layout).write_text("\n".join(lines))
    elif layout != "beside":
        lines = [f'"{text}",{name}' for name, text in rows.items()]
        (tmp_path / layout).write_text("\n".join(["text,file_name", *lines]))
    found = list_videos(tmp_path)
    assert {video.path.name: video.caption for video in found.videos} == rows
    assert found.skipped == ()


def test_captions_may_hold_line_breaks(tmp_path: Path) -> None:
    write(tmp_path / "a.gif", grey(3), None)
    (tmp_path / "captions.csv").write_text('file_name,text\na.gif,"red,\nmoving"\n')
    assert list_videos(tmp_path).videos[0].caption == "red, moving"
    (tmp_path / "captions.csv").unlink()
    entry = json.dumps({"file_name": "a.gif", "text": "red\u2028moving"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"{entry}\n", encoding="utf-8")
    assert list_videos(tmp_path).videos[0].caption == "red moving"


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    write(tmp_path / "good.gif", grey(3))
    write(tmp_path / "untold.gif", grey(3), None)
    write(tmp_path / "silent.gif", grey(3), " \n")
    found = list_videos(tmp_path)
    assert [video.path.name for video in found.videos] == ["good.gif"]
    assert len(found.skipped) == 2
    assert any("untold.txt" in line for line in found.skipped)
    assert any("silent.gif: its caption is empty" in line for line in found.skipped)
    entries = [{"file_name": name, "text": "x"} for name in ("good.gif", "missing.mp4")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    found = list_videos(tmp_path)
    assert [video.path.name for video in found.videos] == ["good.gif"]
    assert any(line.startswith("missing.mp4") for line in found.skipped)
    assert any("untold.gif: expected a caption in metadata.jsonl" in s for s in found.skipped)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.gif"}', 'expected "file_name" and "text" in line 1'),
        ("metadata.jsonl", '\n{"file_name"', "a JSON object in line 2"),
        ("metadata.jsonl", "[1]", "in line 1"),
        ("captions.csv", "file_name,caption\na.gif,x", 'expected "file_name" and "text" in line 2'),
        ("captions.csv", "file_name,text\na.gif,x\na.gif,y", "line 3 gives another"),
        ("metadata.csv", "file_name,text\nb.gif,x", "found none; left out"),
    ],
)
def test_doubtful_captions_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    write(tmp_path / "a.gif", grey(3), None)
    (tmp_path / name).write_text(text)
    with pytest.raises(DistillationError, match=message):
        list_videos(tmp_path)


def test_nothing_to_find_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DistillationError, match="a folder of videos"):
        list_videos(tmp_path / "none")
    with pytest.raises(DistillationError, match="found none"):
        list_videos(tmp_path)
    for name in ("metadata.jsonl", "captions.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(DistillationError, match="keep one"):
        list_videos(tmp_path)


@pytest.mark.parametrize("kind", [".mp4", ".gif", ""])
def test_a_clip_too_short_is_named(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"one{kind}", grey(4))
    with pytest.raises(VideoError, match=r"one.* to have at least 5 frames, it has 4"):
        read_clip(path, 5, 32, 32)
    with pytest.raises(VideoError, match=r"one.* to have at least 5 frames, it has 4"):
        check_clip(path, 5)
    check_clip(path, 4)
    with pytest.raises(VideoError, match="at least 7 frames"):  # 10 a second, taken at 5
        read_clip(write(tmp_path / "two.gif", grey(6)), 4, 32, 32, rate=5)


@pytest.mark.parametrize("kind", [".mp4", ".webm", ".gif", ".avi"])
def test_a_damaged_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"one{kind}"
    for content in (b"", b"nonsense" * 99):
        path.write_bytes(content)
        with pytest.raises(VideoError, match=f"one{kind}, cannot read it"):
            read_clip(path, 5, 32, 32)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "one", grey(5))
    whole = (path / "frame3.png").read_bytes()
    (path / "frame3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match="one, cannot read it"):
        read_clip(path, 5, 32, 32)


def test_a_changed_video_is_another(tmp_path: Path) -> None:
    write(tmp_path / "one", grey(3))
    (before,) = [video.identity for video in list_videos(tmp_path).videos]
    iio.imwrite(tmp_path / "one" / "frame3.png", grey(1)[0])
    (after,) = [video.identity for video in list_videos(tmp_path).videos]
    assert before != after
