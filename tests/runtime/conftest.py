"""Every test compiles models of the same class: what Dynamo remembers of one is not the next's."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()
