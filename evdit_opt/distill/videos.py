"""A folder of captioned videos: what is in it, and one clip of it as pixels.

The layout is that of a Hugging Face video folder, ``metadata.jsonl`` or a CSV with the columns
"file_name" and "text", or simply a ``name.txt`` beside every ``name.mp4``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evdit_opt.errors import DistillationError, VideoError

__all__ = ["CaptionedVideo", "VideoFolder", "check_clip", "list_videos", "read_clip"]

VIDEOS = (".mp4", ".webm", ".gif", ".avi", ".mov", ".mkv")
PICTURES = (".png", ".jpg", ".jpeg")
LISTS = ("metadata.jsonl", "metadata.csv", "captions.csv")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedVideo:
    """A video file, or a folder with a picture a frame, and what it shows."""

    path: Path
    caption: str

    @property
    def identity(self) -> str:
        """Name, size in bytes and caption: when one changes, the clip has to be encoded again."""
        files = _pictures(self.path) if self.path.is_dir() else [self.path]
        size = sum(file.stat().st_size for file in files)
        return f"{self.path.name}, {len(files)} files of {size} bytes: {self.caption}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFolder:
    """The videos with captions, by name, and a line for each entry that was left out, and why."""

    videos: tuple[CaptionedVideo, ...]
    skipped: tuple[str, ...]


def list_videos(folder: Path) -> VideoFolder:
    """What a folder holds.

    Raises:
        DistillationError: no such folder, a damaged or doubtful list of captions, or no video with
            a caption.
    """
    if not folder.is_dir():
        raise DistillationError(f"expected a folder of videos, {folder} is none")
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise DistillationError(
            f"expected one list of captions in {folder}, got {', '.join(p.name for p in lists)}; "
            "keep one"
        )
    here = {path.relative_to(folder).as_posix(): path for path in sorted(folder.iterdir())}
    found = {name: path for name, path in here.items() if _is_video(path)}
    captions = _listed(lists[0]) if lists else _beside(found)
    videos, skipped = [], []
    for name in sorted({*found, *captions}):
        path = folder / name
        if name not in captions:
            wanted = lists[0].name if lists else f"{path.stem}.txt"
            skipped.append(f"{name}: expected a caption in {wanted}, there is none")
        elif not _is_video(path):
            skipped.append(f"{name}: expected a video or a folder of pictures, there is none")
        elif not captions[name]:
            skipped.append(f"{name}: its caption is empty")
        else:
            videos.append(CaptionedVideo(path=path, caption=captions[name]))
    if not videos:
        told = f"; left out: {'; '.join(skipped[:5])}" if skipped else ""
        raise DistillationError(
            f"expected videos ({' '.join(VIDEOS)}, or folders of pictures) with captions in "
            f"{folder}, found none{told}; see docs/distillation.md for the layout"
        )
    return VideoFolder(videos=tuple(videos), skipped=tuple(skipped))


def read_clip(
    path: Path, frames: int, height: int, width: int, rate: float | None = None
) -> np.ndarray:
    """The middle of a video: in time a run of frames, in each frame the largest part that fits.

    Args:
        path: a video file, or a folder with a picture a frame, in the order of their numbers.
        frames: how many.
        height: of the clip, in pixels.
        width: of the clip, in pixels.
        rate: frames a second to sample at, each the nearest; None: frame after frame. Folders and
            GIFs without durations have no rate of their own, and are taken frame after frame.

    Returns:
        [frames, height, width, 3] uint8.

    Raises:
        VideoError: it cannot be read, or is too short.
    """
    with _readable(path):
        wanted = _window(path, frames, rate)
        kept, number = {}, -1
        for number, picture in enumerate(_frames(path)):
            if number in wanted:
                kept[number] = _fit(picture, height, width)
            if number == wanted[-1]:
                break
    if wanted[-1] not in kept:
        raise VideoError(
            f"expected {path} to have at least {wanted[-1] + 1} frames, {number + 1} can be read"
        )
    return np.stack([kept[n] for n in wanted])


def check_clip(path: Path, frames: int, rate: float | None = None) -> None:
    """As `read_clip`, by what the file says about itself: no frame is decoded.

    Raises:
        VideoError: it cannot be read, or is too short.
    """
    with _readable(path):
        _window(path, frames, rate)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the readers raise for files that are none of theirs, as one error."""
    try:
        yield
    except VideoError:
        raise
    except (OSError, RuntimeError, ValueError, SyntaxError, LookupError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise VideoError(f"expected a video in {path}, cannot read it: {said}") from error


def _window(path: Path, frames: int, rate: float | None) -> list[int]:
    """Numbers of the frames to take."""
    count, own_rate = _length(path)
    stride = own_rate / rate if rate is not None and own_rate is not None else 1.0
    span = round((frames - 1) * stride) + 1
    if count < span:
        raise VideoError(f"expected {path} to have at least {span} frames, it has {count}")
    begin = (count - span) // 2
    return [begin + round(n * stride) for n in range(frames)]


def _is_video(path: Path) -> bool:
    if path.is_dir():
        return bool(_pictures(path))
    return path.is_file() and path.suffix.lower() in VIDEOS


def _pictures(folder: Path) -> list[Path]:
    """Pictures by the numbers in their names, so that frame 10 comes after frame 2."""

    def by_number(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(p), "") if p.isdecimal() else (0, p) for p in parts]

    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    return sorted(found, key=by_number)


def _beside(found: dict[str, Path]) -> dict[str, str]:
    captions = {}
    for name, path in found.items():
        text = path.with_suffix(".txt") if path.is_file() else path.with_name(path.name + ".txt")
        if text.is_file():
            captions[name] = " ".join(_text(text).split())
    return captions


def _listed(path: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for line, entry in _entries(path):
        name, text = (entry.get(key) if isinstance(entry, dict) else None for key in KEYS)
        if not isinstance(name, str) or not isinstance(text, str):
            raise DistillationError(
                f'expected "file_name" and "text" in line {line} of {path}, got {entry!r}'
            )
        name = Path(name).as_posix()
        if name in captions:
            raise DistillationError(
                f"expected one caption for {name} in {path}, line {line} gives another; keep one"
            )
        captions[name] = " ".join(text.split())
    return captions


KEYS = ("file_name", "text")


def _entries(path: Path) -> Iterator[tuple[int, object]]:
    text = _text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(text.split("\n"), 1):  # captions may hold other line separators
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DistillationError(
                    f"expected a JSON object in line {number} of {path}: {error}"
                ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DistillationError(f"expected UTF-8 text in {path}: {error}") from error


def _length(path: Path) -> tuple[int, float | None]:
    """How many frames a video has, and how many a second."""
    if path.is_dir():
        return len(_pictures(path)), None
    if path.suffix.lower() == ".gif":  # ffmpeg merges frames that are shown for no time
        from PIL import Image

        with Image.open(path) as image:
            milliseconds = image.info.get("duration", 0)
            return getattr(image, "n_frames", 1), 1000 / milliseconds if milliseconds else None
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(path, pix_fmt="rgb24")
    try:
        rate = float(next(reader)["fps"])
    finally:
        reader.close()
    count, _ = imageio_ffmpeg.count_frames_and_secs(path)
    return count, rate or None


def _frames(path: Path) -> Iterator[np.ndarray]:
    """Frames in turn, each [height, width, 3] uint8."""
    if path.is_dir():
        from PIL import Image

        for file in _pictures(path):
            with Image.open(file) as image:
                yield np.asarray(image.convert("RGB"))
    elif path.suffix.lower() == ".gif":
        from PIL import Image, ImageSequence

        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield np.asarray(frame.convert("RGB"))
    else:
        import imageio_ffmpeg

        reader = imageio_ffmpeg.read_frames(path, pix_fmt="rgb24")
        try:
            width, height = next(reader)["size"]
            for data in reader:
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        finally:
            reader.close()


def _fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop to the shape of the clip around the centre, and resize; uint8 like ``picture``."""
    from PIL import Image

    rows, columns = picture.shape[:2]
    scale = min(rows / height, columns / width)
    left, top = (columns - width * scale) / 2, (rows - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized)
