"""Clips for a page: mp4 files, in one subfolder per variant, those of one name side by side."""

import base64
from dataclasses import dataclass
from pathlib import Path

from evdit_opt.errors import UnsupportedInputError

__all__ = ["Clip", "load_clips"]

MAX_BYTES = 64 * 2**20
"""Of all clips together: a page of more is too large for browsers and mail."""


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        name: what it shows; clips of one name belong together.
        variant: which model made it; "" for clips that lie in the folder itself.
        data: the file as a ``data:`` URI.
    """

    name: str
    variant: str
    data: str


def load_clips(folder: Path) -> tuple[Clip, ...]:
    """The clips of a folder, by name, each in the order of the variants' names, "dense" first.

    Args:
        folder: holds ``VARIANT/NAME.mp4``, or ``NAME.mp4``, or both.

    Raises:
        UnsupportedInputError: if there are none, one is no mp4, or they are too large together.
    """
    files = sorted([*folder.glob("*.mp4"), *folder.glob("*/*.mp4")])
    if not files:
        raise UnsupportedInputError(
            f"expected clips in {folder}, as NAME.mp4 or VARIANT/NAME.mp4, found none"
        )
    size = sum(path.stat().st_size for path in files)
    if size > MAX_BYTES:
        raise UnsupportedInputError(
            f"expected clips of at most {MAX_BYTES >> 20} MiB together, got {size / 2**20:.0f} MiB "
            f"in {folder}; give fewer or smaller ones"
        )
    clips = [_load(path, "" if path.parent == folder else path.parent.name) for path in files]
    return tuple(sorted(clips, key=lambda c: (c.name, c.variant != "dense", c.variant)))


def _load(path: Path, variant: str) -> Clip:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnsupportedInputError(f"expected a readable clip: {error}") from error
    if content[4:8] != b"ftyp":
        raise UnsupportedInputError(f"expected {path} to be an mp4 file, its first bytes are not")
    return Clip(path.stem, variant, "data:video/mp4;base64," + base64.b64encode(content).decode())
