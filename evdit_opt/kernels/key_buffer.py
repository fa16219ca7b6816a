"""The keys of a few query frames side by side."""

from torch import Tensor

from evdit_opt.kernels.decomposition import Run
from evdit_opt.kernels.geometry import Geometry, own_windows

__all__ = ["KeyBuffer"]


class KeyBuffer:
    """Keys of a few rows at a time, ``[rows | batch, heads, shared + own, head_dim]``.

    The shared keys are copied when it is made; the own keys of a row when it is asked for.
    """

    def __init__(
        self, source: Tensor, shared: list[tuple[int, int]], rows: int, capacity: int
    ) -> None:
        self.source = source
        self.shared = sum(stop - start for start, stop in shared)
        self.buffer: Tensor | None = None
        self.shape = (max(rows, source.shape[0]), source.shape[1])
        self.length = self.shared + capacity
        if shared:
            buffer = self._allocate()
            offset = 0
            for start, stop in shared:
                buffer[:, :, offset : offset + stop - start] = source[:, :, start:stop]
                offset += stop - start

    def rows(self, geometry: Geometry, run: Run, first: int, count: int) -> Tensor:
        """Keys of rows ``first .. first + count`` of ``run``; valid until the next call."""
        if not self.shared and len(run.own) == 1:
            start, stop, _ = run.own[0]
            return own_windows(self.source, geometry, first, count, start, stop)
        buffer = self._allocate() if self.buffer is None else self.buffer
        used = buffer[:count] if count > 1 or self.source.shape[0] == 1 else buffer
        offset = self.shared
        for start, stop, _ in run.own:
            length = (stop - start) * geometry.tokens
            used[:, :, offset : offset + length] = own_windows(
                self.source, geometry, first, count, start, stop
            )
            offset += length
        return used[:, :, :offset]

    def _allocate(self) -> Tensor:
        rows, heads = self.shape
        width = self.source.shape[3]
        if self.source.stride(1) < self.source.stride(2):
            # Tokens outside heads, as in the source: whole frames are then copied in one piece.
            self.buffer = self.source.new_empty(rows, self.length, heads, width).transpose(1, 2)
        else:
            self.buffer = self.source.new_empty(rows, heads, self.length, width)
        return self.buffer
