"""Reading the grid from a forward's arguments."""

import pytest
import torch

from evdit_opt.errors import LayoutError
from evdit_opt.grid import VideoGrid
from evdit_opt.passes.grid_source import GridSource


def patches(**changes: object) -> GridSource:
    fields = {"kind": "patch", "input": "hidden_states", "patch": (1, 2, 2), "dims": (2, 3, 4)}
    return GridSource(**{**fields, **changes})  # type: ignore[arg-type]


def test_from_the_shape_of_the_latent() -> None:
    latent = torch.empty(1, 16, 5, 12, 8)
    assert patches().read({"hidden_states": latent}) == VideoGrid(5, 6, 4)


def test_from_a_latent_with_frames_before_channels() -> None:
    latent = torch.empty(1, 5, 16, 12, 8)
    assert patches(dims=(1, 3, 4)).read({"hidden_states": latent}) == VideoGrid(5, 6, 4)


def test_from_arguments() -> None:
    source = patches(kind="arguments", patch=(1, 1, 1))
    call = {"hidden_states": torch.empty(1, 120, 8), "num_frames": 5, "height": 6, "width": 4}
    assert source.read(call) == VideoGrid(5, 6, 4)


def test_given_for_one_size_of_clip() -> None:
    source = patches(kind="given", patch=(5, 6, 4))
    for shape in ((2, 120, 8), (2, 120, 4, 1, 2, 2)):  # tokens; a list of patches
        assert source.read({"hidden_states": torch.empty(shape)}) == VideoGrid(5, 6, 4)
    with pytest.raises(LayoutError, match=r"120 tokens.*make a plan for clips of this size"):
        source.read({"hidden_states": torch.empty(2, 96, 8)})


@pytest.mark.parametrize(
    ("source", "call", "message"),
    [
        (patches(), {}, "the video in argument 'hidden_states'"),
        (patches(), {"hidden_states": torch.empty(1, 2, 3)}, "more than 4 dimensions"),
        (patches(), {"hidden_states": torch.empty(1, 4, 3, 1, 8)}, "at least one patch"),
        (patches(kind="arguments"), {"num_frames": 3, "height": 2}, "num_frames, height, width"),
    ],
    ids=["missing", "not-5-d", "smaller-than-a-patch", "no-width"],
)
def test_what_is_missing_is_named(source: GridSource, call: dict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        source.read(call)
