"""Frozen dataclasses to JSON and back, for files that may come from a stranger.

Reading accepts exactly what writing produces: known keys once each, the declared types, finite
numbers. Anything else is one :class:`PlanError` that names the field. Ranges are the business of
the dataclasses' own ``__post_init__``.
"""

import dataclasses
import functools
import json
import math
import types
from collections import Counter
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from evdit_opt.errors import EvditError, PlanError

__all__ = ["OPTIONAL", "build", "dump", "parse", "shorten"]

T = TypeVar("T")
MAX_DIGITS = 25  # more than any 64-bit integer has; Python converts longer ones in quadratic time
MAX_TEXT = 1000
MAX_VALUES = 120_000  # what little ones would take, of which a file of some MiB may hold millions
Pairs = tuple[tuple[str, str], ...]  # written as a JSON object
OPTIONAL = "optional"
"""Metadata of a field that is written only where it differs from its default."""


def dump(value: Any) -> str:
    """Pretty JSON with sorted keys; an object or list without inner ones stands on one line.

    Args:
        value: a dataclass of numbers, strings, None, tuples and dataclasses.
    """
    return _lines(_plain(value), "") + "\n"


def parse(text: str) -> Any:
    """JSON text to Python objects, refusing what JSON itself or common sense does not allow.

    Raises:
        PlanError: on text that is not JSON, nested too deeply, of too many values, with a key given
            twice, with NaN or Infinity, or with a number too long.
    """
    if _count_values(text) > MAX_VALUES:
        raise PlanError(f"expected JSON of at most {MAX_VALUES} values, got more")
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except json.JSONDecodeError as error:
        raise PlanError(f"expected JSON, got something else: {error}") from error
    except RecursionError as error:
        raise PlanError("expected a few levels of nesting, got too many to read") from error


def build(hint: Any, value: Any, where: str) -> Any:
    """Make what ``hint`` declares from parsed JSON.

    Args:
        hint: a dataclass, int, float, str, bool, a ``Literal`` of strings, a tuple type, or one of
            these ``| None``.
        value: what :func:`parse` returned for it.
        where: name of the field, for messages.

    Raises:
        PlanError: if the value is not exactly of that type, or the dataclass refuses it.
    """
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, where)
    if get_origin(hint) is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            _refuse(where, f"one of {', '.join(get_args(hint))}", value)
        return value
    if hint == Pairs:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            _refuse(where, "an object of strings", value)
        return tuple(sorted(value.items()))
    if get_origin(hint) is tuple:
        return _build_tuple(get_args(hint), value, where)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _refuse(where, "a number", value)
        return float(value)
    if type(value) is not hint:  # not isinstance: a bool is no int here
        _refuse(where, {int: "an integer", str: "a string", bool: "true or false"}[hint], value)
    if hint is str and (len(value) > MAX_TEXT or not value.isprintable()):
        _refuse(where, f"at most {MAX_TEXT} printable characters", value)
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _refuse(where, "an object", value)
    hints = _hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    optional = [field.name for field in dataclasses.fields(kind) if field.metadata.get(OPTIONAL)]
    for problem, keys in (
        ("misses", [name for name in names if name not in value and name not in optional]),
        ("has the unknown", [key for key in value if key not in names]),
    ):
        if keys:
            raise PlanError(f"{where} {problem} field {shorten(keys[0])}")
    fields = {key: build(hints[key], value[key], f"{where}.{key}") for key in names if key in value}
    try:
        return kind(**fields)
    except EvditError as error:
        raise PlanError(f"{where}: {error}") from error


def _build_tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _refuse(where, "a list", value)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(value) != len(items):
        _refuse(where, f"a list of {len(items)}", value)
    pairs = zip(items, value, strict=True)
    return tuple(build(item, part, f"{where}[{n}]") for n, (item, part) in enumerate(pairs))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        plain: dict[str, Any] = {}
        hints = _hints(type(value))  # type: ignore[arg-type]  # a class is hashable
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if field.metadata.get(OPTIONAL) and item == field.default:
                continue
            pairs = hints[field.name] == Pairs
            plain[field.name] = dict(item) if pairs else _plain(item)
        return plain
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _lines(value: Any, indent: str) -> str:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, (dict, list)) for item in inner):
        return json.dumps(value, sort_keys=True, allow_nan=False)
    deeper = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}: {_lines(v, deeper)}" for k, v in sorted(value.items())]
        opening, closing = "{}"
    else:
        parts = [_lines(item, deeper) for item in value]
        opening, closing = "[]"
    body = ",\n".join(deeper + part for part in parts)
    return f"{opening}\n{body}\n{indent}{closing}"


_hints = functools.cache(get_type_hints)  # of as many classes as there are kinds of records


def _count_values(text: str) -> int:
    """An upper bound on the values in a JSON text, before any of them is made."""
    openings = "[{,"
    if sum(map(text.count, openings)) <= MAX_VALUES:
        return 0  # whatever stands in strings
    pieces = text.replace("\\\\", "").replace('\\"', "").split('"')
    outside = "".join(pieces[::2])
    return sum(map(outside.count, openings))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise PlanError(f"expected every key once, got {shorten(key)} twice in one object")
    return found


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise PlanError(f"expected numbers of at most {MAX_DIGITS} digits, got {len(digits)}")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise PlanError(f"expected finite numbers, got {shorten(digits)}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise PlanError(f"expected finite numbers, got {name}")


def _refuse(where: str, expected: str, value: Any) -> NoReturn:
    raise PlanError(f"expected {where} to be {expected}, got {shorten(value)}")


def shorten(value: Any) -> str:
    """A value from a file, in at most 60 harmless characters."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
