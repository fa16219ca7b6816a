"""Mutated plan files: our own errors only, and each within a second and 100 MB.

What is accepted must also be good for everything that is done with a plan that came from elsewhere.
"""

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt import plan as plan_module
from evdit_opt.errors import EvditError
from evdit_opt.page import plan_page
from evdit_opt.plan import Plan
from evdit_opt.plan_diff import plan_differences
from evdit_opt.strict_json import MAX_VALUES, parse
from tests.plans import PLAN, SPLIT, TEXT

SECONDS = 1.0
"""Of CPU time, for one file."""

BYTES = 100 * 10**6
"""Of Python objects, at their peak."""

RAW = "@raw {}@"
"""Stands for text that no JSON writer would write, until the rest is written."""

# What a text may hold where a value is expected: (text, is it quick to make in any number).
VALUES = (
    "null", "true", "[]", "{}", '""', "0", "-1", "1.5", "-0.0", "1e308", "1e-320", "1e999", "NaN",
    "Infinity", "-Infinity", "9" * 19, "9" * 26, "-" + "9" * 5000, "0." + "3" * 100_000,
    "1" + "0" * 400 + ".5", "01", "+1", "0x10", "1_000", "True", "'a'", '"\\ud800"', '"\\u0000"',
    '"\\u202e"', '"' + "x" * 300_000 + '"', '"' + "\\u00e9" * 1000 + '"', '"a\tb"', "[1,]",
    '{"a":1,"a":1}', '{"":{}}', "[" * 900 + "]" * 900, "[" * 100_000, '{"a":' * 100_000,
    '{"a":' * 500 + "1" + "}" * 500, "[[],[]]", '["mark"]', '"mark"', '"balanced"', "4096", "4097",
    "2147483647", "9007199254740993",
)  # fmt: skip

Mutation = Callable[[Any, list[str]], None]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of parsed JSON, in order."""
    found: list[tuple[Any, Any]] = []
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, inner in items:
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            found += places(inner)
    return found


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """What to do, where, with what, how often; numbers are taken modulo what there is."""
    kind = draw(st.sampled_from(["put", "drop", "rename", "repeat", "twice", "move", "wrap"]))
    return kind, draw(st.integers(0, 500)), draw(st.integers(0, 500)), draw(st.integers(1, 5000))


def mutate(data: Any, mutation: tuple[str, int, int, int], raw: list[str]) -> None:
    """Change parsed JSON in place; texts that stand for themselves are added to ``raw``."""
    kind, where, what, often = mutation
    found = places(data)
    if not found:
        return
    container, key = found[where % len(found)]
    if kind == "put":
        raw.append(VALUES[what % len(VALUES)])
        container[key] = RAW.format(len(raw) - 1)
    elif kind == "drop":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        other, other_key = found[what % len(found)]
        container[str(other_key)] = container.pop(key)
    elif kind == "repeat":
        lists = [value for value in (c[k] for c, k in found) if isinstance(value, list) and value]
        if lists:
            own = lists[where % len(lists)]
            own *= min(often, 20_000 // len(json.dumps(own)) + 1)
            for n, one in enumerate(own):  # sites that differ are what is looked at further on
                if isinstance(one, dict) and "name" in one:
                    own[n] = {**one, "name": f"blocks.{n}"}
    elif kind == "twice" and isinstance(container, dict):
        raw.append(f"0,{json.dumps(key)}:0")
        container[key] = RAW.format(len(raw) - 1)
    elif kind == "move":
        other, other_key = found[what % len(found)]
        container[key], other[other_key] = json.loads(
            json.dumps([other[other_key], container[key]])
        )
    elif kind == "wrap":
        container[key] = [container[key]] if what % 2 else {"plan": container[key]}


def spoil(content: bytes, way: str, where: int) -> bytes:
    """Damage the bytes of a file."""
    at = where % (len(content) + 1)
    return {
        "none": lambda: content,
        "cut": lambda: content[:at],
        "latin": lambda: content[:at] + b"\xe4" + content[at:],
        "zero": lambda: content[:at] + b"\0" + content[at:],
        "surrogate": lambda: content[:at] + b"\xed\xa0\x80" + content[at:],
        "mark": lambda: b"\xef\xbb\xbf" + content,
        "wide": lambda: content.decode().encode("utf-16"),
        "double": lambda: content + content,
        "pad": lambda: content + b" " * (plan_module.MAX_BYTES - len(content)),
        "too large": lambda: content + b" " * plan_module.MAX_BYTES,
        "astral": lambda: content.replace(b"searched", "\U0001f600".encode()),
    }[way]()


WAYS = ("none", "none", "none", "none", "none", "cut", "latin", "zero", "surrogate", "mark", "wide",
        "double", "pad", "too large", "astral")  # fmt: skip


SOURCES = TEXT, SPLIT.to_json()

Recipe = tuple[list[tuple[str, int, int, int]], str, int]
recipes = st.tuples(
    st.lists(mutations(), min_size=1, max_size=4), st.sampled_from(WAYS), st.integers(0, 10**6)
)


def made(recipe: Recipe) -> bytes:
    """A plan file after a few mutations of its structure, its numbers and its bytes."""
    changes, way, where = recipe
    data, raw = json.loads(SOURCES[where % 2]), []
    for mutation in changes:
        mutate(data, mutation, raw)
    text = json.dumps(data)
    for n, value in enumerate(raw):
        mark = json.dumps(RAW.format(n))
        room = 2 * plan_module.MAX_BYTES // len(value)
        text = text.replace(mark, value, room).replace(mark, "0")
    return spoil(text.encode(), way, where)


def load(file: Path) -> bool:
    """Load a plan and do what is done with plans that came from elsewhere; whether it is one."""
    try:
        plan = Plan.load(file)
        assert Plan.from_json(plan.to_json()) == plan
        plan.describe(), plan.fingerprint(), plan_page(plan), plan_differences(plan, PLAN)
    except EvditError as error:
        assert len(str(error)) < 2000 + len(str(file))  # noqa: PT017 - success is fine, too
        return False
    return True


def check(content: bytes, file: Path) -> bool:
    """:func:`load`, twice: within the time, and within the memory."""
    file.write_bytes(content)
    for last in (False, True):  # what else a core does can double the CPU time
        start = time.process_time()
        found = load(file)
        seconds = time.process_time() - start
        if seconds < SECONDS:
            break
        assert not last, f"{seconds:.2f} s of CPU time"
    tracemalloc.start()
    try:
        assert load(file) == found
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BYTES, f"{peak / 1e6:.0f} MB"
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "plan.json"


@settings(max_examples=200)
@given(recipes)
def test_mutated_files(scratch: Path, recipe: Recipe) -> None:
    check(made(recipe), scratch)


@pytest.mark.nightly
@settings(max_examples=2000)
@given(recipes)
def test_two_thousand_mutated_files(scratch: Path, recipe: Recipe) -> None:
    check(made(recipe), scratch)


def filled(unit: str, opening: str, closing: str, values: int) -> bytes:
    """As many of a value as a file may hold, or as ``values`` come to."""
    room = plan_module.MAX_BYTES - len(opening) - len(closing) - len(unit)
    one = unit + ","
    count = min(room // len(one), values // sum(map(one.count, "[{,")))
    return (opening + one * count + unit + closing).encode()


@pytest.mark.parametrize("unit", ["0", "[]", '"ab"', '{"a":0}', '[{"a":[0]}]'], ids=ascii)
@pytest.mark.parametrize("values", [10**7, MAX_VALUES - 200], ids=["full", "all allowed"])
def test_a_file_full_of_little(scratch: Path, unit: str, values: int) -> None:
    opening = TEXT[: TEXT.index('"sites": [') + len('"sites": [')]
    assert not check(filled(unit, opening, "]}", values), scratch)


@pytest.mark.parametrize(
    "text", ["[]{},", '\\"', "\\\\"], ids=["like values", "quotes", "backslashes"]
)
def test_what_stands_in_strings_are_no_values(text: str) -> None:
    data = [text * (1000 // len(text))] * 2000
    assert parse(json.dumps(data)) == data


def test_a_file_full_of_keys(scratch: Path) -> None:
    keys = ",".join(f'"{n}":0' for n in range(MAX_VALUES - 2))
    assert not check(("{" + keys + "}").encode(), scratch)


def test_the_largest_plan_loads_in_time(scratch: Path) -> None:
    """As many sites as may be, with as much evidence as fits."""
    data = json.loads(TEXT)
    site = json.dumps({**data["sites"][0], "errors": data["sites"][0]["errors"] * 4})
    values = sum(site.count(one) for one in "{[,") + 2  # and in the list of those that reuse
    count = min(
        4096,
        (plan_module.MAX_BYTES - 2 * len(TEXT)) // (len(site) + 10),
        (MAX_VALUES - 2 * len(TEXT)) // values,
    )
    assert count > 500
    data["sites"] = [{**json.loads(site), "name": f"blocks.{n}"} for n in range(count)]
    data["reuse"]["sites"] = [f"blocks.{n}" for n in range(count)]
    scratch.write_text(json.dumps(data))
    start = time.process_time()
    plan = Plan.load(scratch)
    assert time.process_time() - start < SECONDS
    assert len(plan.sites) == count
