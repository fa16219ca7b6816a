"""Which argument is the video, and the readings of its grid."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evdit_opt.errors import LayoutError
from evdit_opt.grid import VideoGrid
from evdit_opt.passes.video_input import bind_arguments, grid_sources, video_input


class Model(nn.Module):
    def __init__(self, **config: object) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)

    def forward(self, control=None, hidden_states=None, text=None, **others):
        return hidden_states


LATENT = torch.randn(1, 16, 5, 12, 8)


def test_arguments_have_names() -> None:
    assert bind_arguments(Model(), (1, 2), {"text": 3, "extra": 4}) == {
        "control": 1,
        "hidden_states": 2,
        "text": 3,
        "extra": 4,
    }


def test_hidden_states_win_over_other_volumes() -> None:
    assert video_input(Model(), (LATENT, LATENT), {}).name == "hidden_states"
    assert video_input(Model(), (LATENT,), {}).name == "control"
    assert video_input(Model(), (), {"hidden_states": torch.randn(2, 9, 4)}).batch == 2


def test_no_video_is_an_error_that_lists_the_tensors() -> None:
    with pytest.raises(LayoutError, match=r"text \(1, 2\)"):
        video_input(Model(), (), {"text": torch.randn(1, 2)})


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({"patch_size": (1, 2, 2)}, (1, 2, 2)),
        ({"patch_size": 2}, (1, 2, 2)),
        ({"patch_size": 2, "patch_size_t": 4}, (4, 2, 2)),
        ({"patch_size": (3, 2), "temporal_patch_size": 2}, (2, 3, 2)),
        ({}, (1, 1, 1)),
    ],
    ids=["triple", "number", "number-and-time", "pair-and-time", "nothing"],
)
def test_the_configs_patch_size_comes_first(config: dict, first: tuple[int, ...]) -> None:
    video = video_input(Model(), (), {"hidden_states": LATENT})
    assert next(grid_sources(Model(**config), video, {})).patch == first


def test_a_patch_embedding_is_read_where_no_config_tells() -> None:
    model = Model()
    model.embed = nn.Conv3d(16, 4, (1, 2, 2), stride=(1, 2, 2))
    model.other = nn.Conv3d(16, 4, 3, padding=1)
    video = video_input(model, (), {"hidden_states": LATENT})
    assert next(grid_sources(model, video, {})).patch == (1, 2, 2)


def test_channels_tell_the_order_of_dimensions() -> None:
    model = Model(in_channels=16)
    frames_first = video_input(model, (), {"hidden_states": LATENT.transpose(1, 2)})
    assert next(grid_sources(model, frames_first, {})).dims == (1, 3, 4)
    last = video_input(model, (), {"hidden_states": LATENT.movedim(1, -1)})
    assert next(grid_sources(model, last, {})).dims == (1, 2, 3)
    unknown = list(grid_sources(Model(), frames_first, {}))
    assert [source.dims for source in unknown] == [(2, 3, 4), (1, 3, 4), (1, 2, 3)]


@pytest.mark.parametrize("shape", [(1, 9, 4), (1, 9, 4, 1, 2, 2)], ids=["tokens", "patches"])
def test_token_inputs_need_the_grid_as_arguments(shape: tuple[int, ...]) -> None:
    call = {"hidden_states": torch.randn(shape)}
    video = video_input(Model(), (), call)
    assert list(grid_sources(Model(), video, call)) == []
    given = list(grid_sources(Model(), video, call, VideoGrid(1, 3, 3)))
    assert [(source.kind, source.patch) for source in given] == [("given", (1, 3, 3))]
    call |= {"num_frames": 1, "height": 3, "width": 3}
    assert [source.kind for source in grid_sources(Model(), video, call)] == ["arguments"]
