"""Of cases of one kind some run every time, and all of them with ``-m nightly``."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

__all__ = ["often"]


def often(names: Iterable[str], cases: Mapping[str, Any]) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``; a case that is a tuple is several arguments.

    Args:
        names: of the cases that run every time.
        cases: all of them, by name.
    """
    names = set(names)
    assert names <= set(cases), f"no case is called {sorted(names - set(cases))}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=name,
            marks=() if name in names else pytest.mark.nightly,
        )
        for name, case in cases.items()
    ]
