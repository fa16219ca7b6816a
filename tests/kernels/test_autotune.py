"""A choice is measured once, survives damage and company, and depends on the versions."""

import json
import logging
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evdit_opt.kernels import autotune

CPU = torch.device("cpu")
KEY: autotune.Key = (("device", "test"), ("tokens", 100), ("density", 0.25), ("text", False))
NAMES = ("slow", "fast")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own."""
    monkeypatch.setattr(autotune, "cache_folder", lambda: tmp_path / "autotune")
    forget()
    yield tmp_path / "autotune"
    forget()


def forget() -> None:
    """As a new process starts."""
    autotune._choices.clear()
    autotune._warn_once.cache_clear()


def work(seconds: float) -> None:
    """Keep the processor busy: a thread that sleeps takes no time of its own."""
    stop = time.thread_time() + seconds
    while time.thread_time() < stop:
        pass


def candidates() -> dict[str, object]:
    return {"slow": lambda: work(0.01), "fast": lambda: work(0.001)}


def choose() -> autotune.Choice:
    return autotune.choose(KEY, candidates(), CPU)  # type: ignore[arg-type]


def test_the_fastest_is_chosen_and_found_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert autotune.remembered(KEY, NAMES) is None
    with caplog.at_level(logging.DEBUG, autotune.__name__):
        choice = choose()
    assert choice.name == "fast"
    assert set(choice.milliseconds) == set(NAMES)
    assert "chose fast (fast 1" in caplog.text
    assert autotune.choices() == (choice,)
    forget()
    assert autotune.remembered(KEY, NAMES) == choice
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize(("seconds", "name"), [(1.01, "first"), (1.05, "second")])
def test_a_tie_goes_to_the_first(
    seconds: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"first": seconds, "second": 1.0}
    runs = {n: (lambda n=n: n) for n in times}
    monkeypatch.setattr(autotune, "_milliseconds", lambda run, device: times[run()])
    choice = autotune.choose(KEY, runs, CPU)
    assert choice.name == name
    assert choice.milliseconds == times
    assert autotune.choose(KEY, runs, CPU, tie=1.5).name == "first"  # wider


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_is_timed_by_its_own_clock(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    slept = autotune._milliseconds(lambda: time.sleep(0.02), CPU)
    assert (slept < 10) == (threads == 1)


def test_a_choice_nobody_offers_any_more_does_not_count() -> None:
    choose()
    assert autotune.remembered(KEY, ("slow",)) is None


def test_another_kind_of_call_is_another_choice() -> None:
    choose()
    assert autotune.remembered((*KEY[:1], ("tokens", 101), *KEY[2:]), NAMES) is None


@pytest.mark.parametrize("package", ["torch", "triton", "evdit_opt"])
def test_another_version_is_another_choice(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose()
    forget()
    versions = {**autotune._versions(), package: "another"}
    monkeypatch.setattr(autotune, "_versions", lambda: versions)
    assert autotune.remembered(KEY, NAMES) is None


def test_versions_name_the_sources() -> None:
    assert {"torch", "evdit_opt"} <= set(autotune._versions())


def damaged(record: dict[str, object]) -> dict[str, bytes]:
    wrong_key = [["device", "other"]]
    return {
        "empty": b"",
        "cut off": json.dumps(record).encode()[:40],
        "not text": b"\xff\xfe\x00",
        "a list": b"[1, 2]",
        "too deep": b"[" * 100_000,
        "another key": json.dumps(record | {"key": wrong_key}).encode(),
        "no times": json.dumps(record | {"milliseconds": {}}).encode(),
        "a time in words": json.dumps(record | {"milliseconds": {"fast": "soon"}}).encode(),
    }


@pytest.mark.parametrize("damage", list(damaged({})))
def test_a_damaged_file_is_ignored_with_one_warning_and_rewritten(
    damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choice = choose()
    (path,) = folder.iterdir()
    path.write_bytes(damaged(json.loads(path.read_text()))[damage])
    forget()
    assert autotune.remembered(KEY, NAMES) is None
    assert autotune.remembered(KEY, NAMES) is None
    assert caplog.text.count("is damaged") == 1
    choose()
    forget()
    found = autotune.remembered(KEY, NAMES)
    assert found is not None
    assert found.name == choice.name


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setattr(autotune, "cache_folder", lambda: in_the_way / "autotune")
    assert choose().name == "fast"
    assert autotune.remembered(KEY, NAMES) is not None  # in this process
    assert "cannot" in caplog.text


def write_often(folder: Path, name: str, times: int) -> None:
    autotune.cache_folder = lambda: folder  # a process of its own
    choice = autotune.Choice(name=name, milliseconds={"slow": 2.0, "fast": 1.0}, key=KEY)
    for _ in range(times):
        autotune._write(autotune._file(KEY), choice)


def test_several_processes_may_write_at_once(folder: Path) -> None:
    """A reader sees one or the other, whole, and never a damaged file."""
    context = multiprocessing.get_context("fork")  # the tests' modules cannot be imported by name
    writers = [context.Process(target=write_often, args=(folder, n, 200)) for n in NAMES]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        forget()
        choice = autotune.remembered(KEY, NAMES)
        assert choice is not None or not seen
        seen |= {choice.name} if choice else set()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    forget()
    assert autotune.remembered(KEY, NAMES) is not None
    assert seen <= set(NAMES)
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_what_cannot_run_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel image")

    choice = autotune.choose(KEY, {"broken": broken, "fast": lambda: None}, CPU)
    assert choice.name == "fast"
    assert "broken cannot run here and is left out: no kernel image" in caplog.text
    assert autotune.remembered(KEY, ("fast",)) == choice
    forget()  # the next process may have the memory
    assert autotune.remembered(KEY, ("fast",)) is None
    with pytest.raises(RuntimeError, match="no kernel image"):
        autotune.choose(KEY, {"broken": broken}, CPU)


def test_measuring_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"slow": 0, "fast": 0, "equal": 0}

    def call(name: str, seconds: float) -> object:
        def run() -> None:
            calls[name] += 1
            work(seconds)

        return run

    runs = {"slow": call("slow", 0.3), "fast": call("fast", 0.03), "equal": call("equal", 0.03)}
    monkeypatch.setattr(autotune, "BUDGET_SECONDS", 1e6)  # the machine may be busy
    autotune.choose(KEY, runs, CPU)  # type: ignore[arg-type]
    rounds = 1 + autotune.ROUNDS
    assert calls == {"slow": 2, "fast": rounds, "equal": rounds}
    monkeypatch.setattr(autotune, "BUDGET_SECONDS", 0.0)
    autotune.choose(KEY, runs, CPU)  # type: ignore[arg-type]
    assert calls == {"slow": 3, "fast": rounds + 1, "equal": rounds + 1}


def test_short_calls_are_timed_more_often() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    autotune.choose(KEY, {"one": run, "two": run}, CPU)
    assert calls > 2 * (1 + autotune.ROUNDS)


def test_the_folder_is_the_user_s_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.cache_folder() == tmp_path / "evdit_opt" / "autotune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autotune.cache_folder() == tmp_path / ".cache" / "evdit_opt" / "autotune"
