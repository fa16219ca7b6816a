"""What holds for every test: repeatable examples, no measuring, GPU tests only with one."""

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from evdit_opt.kernels import dispatch

if not torch.cuda.is_available():
    # Read when triton is first imported, by Inductor perhaps: kernels then run on the CPU, slowly.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run: a red test stays red until it is fixed.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=100, print_blob=True
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def fastest() -> Iterator[Callable[..., str]]:
    """impl="auto" goes by a rule of thumb: most shapes run once here. Yields what it does else."""
    measured = dispatch._fastest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_fastest", lambda *_: "decomposed")
        yield measured


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # workers share the cores already


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
