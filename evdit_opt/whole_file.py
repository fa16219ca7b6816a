"""Files that are always whole: written under another name, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file so that ``path`` never holds half of one.

    A block that fails leaves ``path`` as it was and nothing beside it. A kill leaves a file ending
    in ``.partial`` at most, which the next writer replaces: one at a time may write.

    Yields:
        The path to write to; after the block it is flushed to the disk and renamed to ``path``.

    Raises:
        OSError: as from the disk.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
