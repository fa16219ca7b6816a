"""Plan files from a stranger: one PlanError, never a crash, never a part of a plan."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evdit_opt import plan as plan_module
from evdit_opt.errors import PlanError, PlanNotFoundError
from evdit_opt.masks import MAX_FRAMES
from evdit_opt.plan import Plan
from tests.plans import PLAN, TEXT

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


SECOND = {
    "rule": {"references": 0, "spacing": "paper", "weighting": "none", "window": 1},
    "heads": [0, 2],
    "total": 4,
}


def second(**change: Any) -> str:
    """The plan's JSON with a second rule at its first site, as it is or with other values."""
    return with_value("sites.0.second", {**SECOND, **change})


def with_value(path: str, value: Any) -> str:
    """The plan's JSON with the value at a dotted path replaced, or added, or (``...``) removed."""
    data = json.loads(TEXT)
    *parents, last = path.split(".")
    where = data
    for key in parents:
        where = where[int(key)] if isinstance(where, list) else where[key]
    if value is ...:
        del where[last]
    else:
        where[int(last) if isinstance(where, list) else last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "expected JSON"),
        ("{}", "schema_version"),
        ("[1]", "schema_version"),
        ("null", "schema_version"),
        (TEXT[: len(TEXT) // 2], "expected JSON"),
        (TEXT + "{}", "expected JSON"),
        ("[" * 50_000, "nesting"),
        ('{"a":' * 50_000, "nesting"),
        (TEXT.replace('"fullgraph"', '"fullgraph": true, "fullgraph"'), "'fullgraph' twice"),
        (TEXT.replace("0.21", "NaN"), "finite numbers, got NaN"),
        (TEXT.replace("0.21", "-Infinity"), "finite numbers, got -Infinity"),
        (TEXT.replace("0.21", "1e999"), "finite numbers, got '1e999'"),
        (TEXT.replace("0.21", "9" * 5000), "at most 25 digits, got 5000"),
        (with_value("schema_version", 1), "schema_version 2, got 1; install"),
        (with_value("schema_version", True), "schema_version 2, got True"),
        (with_value("schema_version", "2"), "schema_version 2, got '2'"),
        (with_value("surprise", 1), "plan has the unknown field 'surprise'"),
        (with_value("sites.0.surprise", 1), r"plan\.sites\[0\] has the unknown field"),
        (with_value("model_class", ...), "plan misses field 'model_class'"),
        (with_value("quality.psnr", ...), r"plan\.quality misses field 'psnr'"),
        (with_value("sites", []), "1 to 4096 sites, got 0"),
        (with_value("sites", {}), r"plan\.sites to be a list"),
        (with_value("sites.1.name", "blocks.0.attn1"), "'blocks.0.attn1' 2 times"),
        (with_value("sites.0.name", 3), r"plan\.sites\[0\]\.name to be a string, got 3"),
        (with_value("sites.0.name", ""), r"plan\.sites\[0\]: expected name to be 1 to 256"),
        (with_value("sites.0.name", "a\x1b[2Jb"), "printable"),
        (with_value("sites.0.name", "\ud800"), "printable"),
        (with_value("sites.0.name", "x" * 257), "1 to 256 printable"),
        (with_value("sites.0.density", 1.5), r"sites\[0\]: expected density"),
        (with_value("sites.0.way", "patch"), r"sites\[0\]\.way to be one of mark, scope"),
        (with_value("sites.0.way", None), r"sites\[0\]\.way to be one of mark, scope"),
        (with_value("sites.1.density", 0.5), "density 1 at a dense site"),
        (with_value("sites.0.density", True), r"density to be a number, got True"),
        (with_value("sites.0.rule.references", 2.0), "references to be an integer, got 2.0"),
        (with_value("sites.0.rule.references", -1), r"rule: expected Rule\.references"),
        (with_value("sites.0.rule.weighting", "heavy"), "weighting to be one of none, bal"),
        (with_value("sites.0.rule.strength", 0.5), r"rule: expected Rule\.strength"),
        (with_value("sites.0.rule.strength", None), "strength to be a number, got None"),
        (second(), r"plan: expected one rule for all heads .* reuses, blocks\.0\.attn1 has two"),
        (second(heads=[]), r"sites\[0\]\.second: expected 1 to 3 of 4 heads .* got 0"),
        (second(heads=[0, 1, 2, 3]), "1 to 3 of 4 heads with a second rule, got 4"),
        (second(heads=[2, 0]), "heads in ascending order, each once"),
        (second(heads=[0, 0]), "heads in ascending order, each once"),
        (second(heads=[-1]), r"heads to be integers in 0\.\.3, got -1"),
        (second(heads=[4]), r"heads to be integers in 0\.\.3, got 4"),
        (second(heads=[True]), r"second\.heads\[0\] to be an integer, got True"),
        (second(heads=[0.0]), r"second\.heads\[0\] to be an integer, got 0.0"),
        (second(heads="02"), r"second\.heads to be a list"),
        (second(heads=None), r"second\.heads to be a list"),
        (second(total=1), "total to be an integer in 2..1024 heads, got 1"),
        (second(total=10**9), "total to be an integer in 2..1024 heads, got 1000000000"),
        (second(total=None), r"second\.total to be an integer, got None"),
        (second(rule=None), r"second\.rule to be an object, got None"),
        (second(rule={**SECOND["rule"], "window": -1}), "a second rule that keeps something"),
        (second(rule=json.loads(TEXT)["sites"][0]["rule"]), "differs from the first one"),
        (second(extra=1), r"sites\[0\]\.second has the unknown field 'extra'"),
        (with_value("sites.1.second", SECOND), r"sites\[1\]: expected a second rule at a site"),
        (with_value("sites.0.second", [SECOND]), r"sites\[0\]\.second to be an object"),
        (with_value("sites.0.second", {}), r"sites\[0\]\.second misses field 'rule'"),
        (with_value("sites.0.errors.0.output", -0.1), r"errors\[0\]: expected output"),
        (with_value("min_tokens", True), r"plan\.min_tokens to be an integer, got True"),
        (with_value("min_tokens", 10**20), "min_tokens to be an integer in"),
        (with_value("fullgraph", 1), "fullgraph to be true or false, got 1"),
        (with_value("grid.frames", 0), r"plan\.grid: expected VideoGrid\.frames"),
        (with_value("grid.frames", MAX_FRAMES + 1), "grid.frames to be an integer in 1..4096"),
        (with_value("grid.width", 10**12), "tokens of the grid"),
        (with_value("grid_source.patch", [1, 2]), "patch to be a list of 3, got a list of 2"),
        (with_value("grid_source.kind", "magic"), "kind to be one of"),
        (with_value("grid_source.input", "x" * 10**6), "input to be at most 1000 printable"),
        (with_value("calibration", None), "plan.calibration to be an object, got None"),
        (with_value("calibration.prompt_count", 0), "prompt_count"),
        (with_value("calibration.trials.0.density", 2), r"trials\[0\]: expected density"),
        (with_value("calibration.held_out_error", -1), "expected held_out_error"),
        (with_value("speed.dense_ms", 0), "dense_ms"),
        (with_value("versions", [["torch", "2"]]), "versions to be an object of strings"),
        (with_value("versions", {"torch": 2}), "versions to be an object of strings"),
        (with_value("versions", {str(n): "1" for n in range(101)}), "at most 100 packages"),
    ],
)
def test_a_bad_plan_is_one_error_that_names_file_and_field(
    text: str, match: str, tmp_path: Path
) -> None:
    file = tmp_path / "hostile.json"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(PlanError, match=match) as caught:
        Plan.load(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(file))


def test_what_is_not_a_plan_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanNotFoundError, match="found no file"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        Plan.pull(tmp_path)
    with pytest.raises(PlanError, match="folder"):
        Plan.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PlanError, match="device"):
        Plan.load(tmp_path / "pipe")  # must not wait for somebody to write
    (tmp_path / "latin.json").write_bytes(TEXT.replace("6ac1", "6äc1").encode("latin-1"))
    with pytest.raises(PlanError, match="UTF-8"):
        Plan.load(tmp_path / "latin.json")


def test_a_large_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.json"
    with file.open("wb") as stream:
        stream.truncate(plan_module.MAX_BYTES + 1)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("the file was opened"))
    with pytest.raises(PlanError, match="at most 4194304 bytes, got 4194305"):
        Plan.load(file)


def test_a_plan_too_large_to_load_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "MAX_BYTES", len(TEXT) - 1)
    with pytest.raises(PlanError, match=f"at most {len(TEXT) - 1} bytes, got {len(TEXT)}"):
        PLAN.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def load_or_plan_error(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    try:
        Plan.load(file)
    except PlanError as error:
        assert str(file) in str(error)  # noqa: PT017 - success is fine, too


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "plan.json"


flips = st.lists(
    st.tuples(st.integers(0, len(TEXT) - 1), st.integers(0, 255)), min_size=1, max_size=8
)


@settings(max_examples=300)
@given(flips)
def test_flipped_bytes_never_crash(scratch: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(TEXT.encode())
    for position, byte in flips:
        content[position] = byte
    load_or_plan_error(bytes(content), scratch)


@given(st.integers(0, len(TEXT) - 2))
def test_truncation_is_always_an_error(scratch: Path, length: int) -> None:
    scratch.write_bytes(TEXT.encode()[:length])
    with pytest.raises(PlanError):
        Plan.load(scratch)


@given(st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_random_content_is_always_an_error(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    with pytest.raises(PlanError):
        Plan.load(scratch)


def paths(value: Any, prefix: str = "") -> list[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append(f"{prefix}{key}")
        if isinstance(inner, (dict, list)):
            found += paths(inner, f"{prefix}{key}.")
    return found


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(paths(json.loads(TEXT))), anything)
def test_a_random_value_in_any_field_never_crashes(scratch: Path, path: str, value: Any) -> None:
    load_or_plan_error(with_value(path, value).encode(), scratch)
