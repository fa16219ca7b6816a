"""What the fused kernels share: every program has its own work, head_dim is cut sensibly."""

import pytest
import torch

from evdit_opt.kernels.geometry import Geometry
from evdit_opt.kernels.triton_tables import make_tables
from evdit_opt.masks import Rule
from tests.kernels.fused import require_interpreter

require_interpreter()
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from evdit_opt.kernels.triton_launch import addressable, locate, split_head_dim  # noqa: E402


@triton.jit
def write_work(tiles_ptr, work_ptr, batches, heads):
    batch, head, start, count, first, last = locate(tiles_ptr, batches, heads)
    row = work_ptr + 6 * tl.program_id(0)
    tl.store(row, batch)
    tl.store(row + 1, head)
    tl.store(row + 2, start)
    tl.store(row + 3, start + count)
    tl.store(row + 4, first)
    tl.store(row + 5, last)


@pytest.mark.parametrize("transposed", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("rule", [Rule(2), Rule(1, 1, "balanced"), Rule(0), Rule(9)], ids=str)
@pytest.mark.parametrize(("batches", "heads"), [(1, 1), (2, 3)])
def test_every_tile_of_every_head_is_one_program(
    rule: Rule, transposed: bool, batches: int, heads: int
) -> None:
    geometry = Geometry(frames=9, tokens=10, prefix=3, suffix=0)
    arguments = (*rule.mask(9).segments(), geometry, 4, torch.device("cpu"))
    tables = make_tables(*arguments, transposed=transposed)
    programs = tables.tiles.shape[0] * heads * batches
    work = torch.full((programs, 6), -1, dtype=torch.int64)
    write_work[(programs,)](tables.tiles, work, batches, heads)
    every = {
        (batch, head, *tile[:4])
        for batch in range(batches)
        for head in range(heads)
        for tile in tables.tiles.tolist()
    }
    assert set(map(tuple, work.tolist())) == every
    # Expensive programs first; among equals all tiles of a head follow each other.
    lengths = (tables.ranges[:, 1] - tables.ranges[:, 0]).tolist()
    costs = [sum(lengths[first:last]) for *_, first, last in work.tolist()]
    assert costs == sorted(costs, reverse=True)
    keys = [
        (-cost, batch, head, start)
        for cost, (batch, head, start, *_) in zip(costs, work.tolist(), strict=True)
    ]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)),
     (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0)), (144, (128, 64)),
     (160, (128, 64)), (256, (256, 0))],
)  # fmt: skip
def test_head_dim_is_split_with_least_padding(head_dim: int, parts: tuple[int, int]) -> None:
    assert split_head_dim(head_dim) == parts


def test_only_what_cannot_be_read_is_copied() -> None:
    x = torch.zeros(2, 40, 3, 16)
    assert addressable(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    assert addressable(x[..., 4:8]).data_ptr() == x[..., 4:8].data_ptr()
    assert addressable(x.transpose(2, 3)).stride(-1) == 1
    assert addressable(x[..., :1].expand(2, 40, 3, 16)).stride() == x.stride()
