"""How far attention repeats: against dense fp64 maps, and in memory linear in the sequence."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt.calibrate.pattern import SHARES, PatternRecord, pack, unpack
from evdit_opt.grid import TokenLayout, VideoGrid

Key = tuple[int, int, int, int]  # run, step, branch, entry of the batch
HEAD_DIM = 8


@st.composite
def histories(draw: st.DrawFn) -> tuple[TokenLayout, dict[tuple[int, int, int], Any]]:
    """Calls of one site: q and k ``[batch, heads, seq, head_dim]``, float64, by run, step, branch.

    Frames and positions are few enough for every row to be looked at.
    """
    grid = VideoGrid(draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    layout = TokenLayout(grid, draw(st.sampled_from([0, 3])), draw(st.sampled_from([0, 2])))
    torch.manual_seed(draw(st.integers(0, 99)))
    size = draw(st.sampled_from([0.5, 2.0]))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), layout.seq_len, HEAD_DIM)
    counts = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    calls = {
        place: size * torch.randn(2, *shape, dtype=torch.float64)
        for place in itertools.product(*map(range, counts))
    }
    return layout, calls


def recorded(layout: TokenLayout, calls: dict[tuple[int, int, int], Any]) -> PatternRecord:
    record = PatternRecord(layout)
    for _run, own in itertools.groupby(calls, key=lambda place: place[0]):
        for place in own:
            q, k = calls[place]
            record.add(q, k, step=place[1], branch=place[2])
        record.end_run()
    return record


def keys_of(row: torch.Tensor, share: float) -> set[int]:
    """The largest weights, one by one, until they hold the share."""
    found: set[int] = set()
    for key in row.argsort(descending=True).tolist():
        if float(row[list(found)].sum()) >= share:
            break
        found.add(key)
    return found


def related(a: Key, b: Key) -> str | None:
    """What is compared in two calls, the later one first."""
    if a[0] != b[0]:
        return "prompts" if b[0] == 0 and a[1:] == b[1:] else None
    if a[1] != b[1]:
        return "timesteps" if a[2:] == b[2:] else None
    return "branches"


@given(histories())
@settings(max_examples=30)
def test_figures_are_those_of_dense_maps(case: Any) -> None:
    layout, calls = case
    video = slice(layout.prefix, layout.prefix + layout.grid.tokens)
    maps: dict[Key, torch.Tensor] = {}
    for (run, step, branch), (q, k) in calls.items():
        dense = (q @ k.transpose(2, 3) * HEAD_DIM**-0.5).softmax(-1)[:, :, video]
        maps |= {(run, step, branch, n): own for n, own in enumerate(dense)}
    heads, rows = next(iter(maps.values())).shape[:2]
    held = {
        (place, head, row, share): keys_of(dense[head, row], share)
        for place, dense in maps.items()
        for head in range(heads)
        for row in range(rows)
        for share in SHARES
    }
    found = recorded(layout, calls).pattern()
    for head, (n, share) in itertools.product(range(heads), enumerate(SHARES)):
        sizes = [len(held[place, head, row, share]) for place in maps for row in range(rows)]
        right = sum(sizes) / len(sizes) / layout.seq_len
        assert float(found.keys[head, n]) == pytest.approx(right, rel=1e-9)
        ious: dict[str, list[float]] = {}
        caught: dict[str, list[float]] = {}
        for (a, b), row in itertools.product(itertools.permutations(maps, 2), range(rows)):
            relation = related(a, b)
            if relation is None or a < b:
                continue
            one, other = held[a, head, row, share], held[b, head, row, share]
            ious.setdefault(relation, []).append(len(one & other) / len(one | other))
            mass = float(maps[a][head, row, list(other)].sum())
            caught.setdefault(relation, []).append(mass)
        assert set(found.iou) == set(ious) == set(found.caught)
        for relation, values in ious.items():
            right = sum(values) / len(values)
            assert float(found.iou[relation][head, n]) == pytest.approx(right, rel=1e-6)
            right = sum(caught[relation]) / len(values)
            assert float(found.caught[relation][head, n]) == pytest.approx(right, rel=1e-9)


@given(histories())
@settings(max_examples=30)
def test_similarity_is_the_mean_over_pairs_of_tiles(case: Any) -> None:
    layout, calls = case
    found = recorded(layout, calls).pattern().similarity
    frames = layout.grid.frames
    if frames < 2:
        assert found is None
        return
    right = []
    for q, k in calls.values():
        dense = (q @ k.transpose(2, 3) * HEAD_DIM**-0.5).softmax(-1)
        for entry, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
            tiles = [
                dense[entry, head, layout.frame_slice(i), layout.frame_slice(j)].flatten()
                for i, j in itertools.product(range(frames), repeat=2)
                if i != j
            ]
            pairs = [
                float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(tiles, 2)
            ]
            right.append((head, sum(pairs) / len(pairs)))
    assert found is not None
    for head, got in enumerate(found.tolist()):
        values = [value for own, value in right if own == head]
        assert got == pytest.approx(sum(values) / len(values), rel=1e-9)


@given(st.integers(1, 70), st.integers(0, 99))
def test_packing_loses_nothing(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 4, (2, 3, length), generator=generator, dtype=torch.uint8)
    packed = pack(levels)
    assert packed.shape[-1] == -(-length // 4)
    assert torch.equal(unpack(packed, length), levels)


PEAK = """
import torch
from evdit_opt.calibrate.pattern import PatternRecord
from evdit_opt.calibrate.site_record import SiteRecord
from evdit_opt.grid import TokenLayout, VideoGrid

def run(grid):
    layout = TokenLayout(grid)
    q, k, v = torch.randn(3, 1, 1, layout.seq_len, 64)
    mass, pattern = SiteRecord(layout, ()), PatternRecord(layout)
    for prompt in range(2):
        for step in range(3):
            mass.add(q, k, v)
            pattern.add(q, k, step=step)
        pattern.end_run()
    assert pattern.pattern().iou["prompts"].eq(1).all()

def peak():
    # Of this program alone: getrusage also counts what the parent held when it forked.
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.manual_seed(0)
run(VideoGrid(8, 4, 5))  # kernels and threads are there
before = peak()
run(VideoGrid(8, 60, 60))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_28800_tokens_need_no_map() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    tokens, rows, number = 28_800, 16, 4
    grown = int(done.stdout)
    assert grown > 3 * tokens * 64 * number, "q, k and v alone are larger: nothing was measured"
    # The rows and what sorting them takes, several times over; a map is 3.3 GB in float32.
    assert grown < 40 * rows * tokens * number + 3 * tokens * 64 * number
    assert grown < tokens**2 * number / 25
