"""Other resolutions, frame counts and batches of calls: what is compiled, and how often."""

import pytest

from evdit_opt import running
from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import VideoGrid
from evdit_opt.passes import capture
from tests.models.case import Shape
from tests.often import often
from tests.runtime.pair import Pair

# The first has no two sizes alike: Dynamo takes equal sizes to be one symbol.
GRIDS = [VideoGrid(*sizes) for sizes in ((6, 3, 4), (6, 5, 7), (6, 2, 3), (5, 4, 5), (6, 3, 4))]

# static: one graph per size. automatic: the second size makes sizes symbolic; frame counts stay
# numbers, because the mask's structure follows from them. dynamic: the same.
SIZES = {"static": (False, 4), "automatic": (None, 3), "dynamic": (True, 3)}
# A batch of one is a number of its own to Dynamo.
BATCHES = {"static": (False, 4), "automatic": (None, 2), "dynamic": (True, 2)}


@pytest.mark.parametrize(("dynamic", "graphs"), often(["automatic"], SIZES))
def test_every_size_has_its_own_masks(dynamic: bool | None, graphs: int) -> None:
    pair = Pair(Shape(layers=1))
    pair.apply(dynamic=dynamic)
    for grid in GRIDS:
        pair.check(Shape(layers=1, grid=grid))
    assert pair.graphs == graphs


@pytest.mark.parametrize(("dynamic", "graphs"), often(["automatic"], BATCHES))
def test_batches_with_and_without_guidance(dynamic: bool | None, graphs: int) -> None:
    pair = Pair(Shape(layers=1))
    pair.apply(dynamic=dynamic)
    for batch in (1, 2, 4, 1, 3, 2):
        pair.check(Shape(layers=1, batch=batch))
    assert pair.graphs == graphs


def test_too_many_sizes_are_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (capture, running):
        monkeypatch.setattr(module, "RECOMPILE_LIMIT", 2)
    pair = Pair(Shape(layers=1))
    pair.apply()
    for batch in (1, 2):
        pair.check(Shape(layers=1, batch=batch))
    with pytest.raises(UnsupportedInputError, match=r"at most 2 kinds of calls.*dynamic=True"):
        pair.check(Shape(layers=1, batch=3))
    pair.check()  # what is compiled still runs
