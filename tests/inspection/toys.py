"""What ``evdit inspect tests.inspection.toys:...`` is given in the tests."""

from typing import Any

from tests.models.toy_dit import ToyDiT, toy, toy_inputs


def good() -> tuple[ToyDiT, dict[str, Any]]:
    print("loading a toy")
    return toy(1), toy_inputs()


def wrong() -> int:
    return 3


def wrong_pair() -> tuple[int, int]:
    return 1, 2


CONSTANT = 3
