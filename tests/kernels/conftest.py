"""Memory that nothing was written to must not look like a result."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

EMPTY_FUNCTIONS = ("empty", "empty_like")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What the package does not write to is NaN, not the zeros of a fresh page."""
    # Made at Dynamo's first use, in the middle of such a test perhaps, and kept: it would not know
    # the real functions any more.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    plain = {name: getattr(torch, name) for name in EMPTY_FUNCTIONS}
    new_empty = torch.Tensor.new_empty

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    with mock.patch.object(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k))):
        with mock.patch.multiple(
            torch, **{n: (lambda *a, f=f, **k: poison(f(*a, **k))) for n, f in plain.items()}
        ):
            yield
