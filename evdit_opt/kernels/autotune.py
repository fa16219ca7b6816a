"""The fastest of several ways to do the same thing: measured once, remembered on disk.

A choice is kept per kind of call (shapes, dtype, device, ...) and per versions of what runs it, one
small JSON file each under the user's cache folder: on Linux ``$XDG_CACHE_HOME/evdit_opt/autotune``
or ``~/.cache/evdit_opt/autotune``. Files are written whole and then renamed, so that any number of
processes may share the folder. It can be deleted at any time.
"""

import functools
import hashlib
import json
import logging
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._appdirs import user_cache_dir

from evdit_opt.versions import installed_versions

__all__ = ["Choice", "cache_folder", "choices", "choose", "remembered", "ruled"]

logger = logging.getLogger(__name__)

# Short calls, which differ by little, are timed more often: as long as it takes no time.
ROUNDS, MAX_ROUNDS = 3, 20
SHORT_SECONDS = 0.1
# After so much time, whoever took this many times as long as the fastest is out.
GIVE_UP = 3.0
# Who is this little slower than the fastest counts as fast as it; the first of them is chosen, so
# that noise does not.
TIE = 1.02
# No further round is begun after this many seconds: calls this long differ by more than the noise.
BUDGET_SECONDS = 1.0

Key = tuple[tuple[str, str | int | float | bool], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What was chosen for one kind of call, and why.

    Attributes:
        name: the candidate that was fastest, or the first of those as fast as it.
        milliseconds: best time of every candidate that could run; none where a rule decided.
        key: the kind of call.
    """

    name: str
    milliseconds: Mapping[str, float]
    key: Key

    def describe(self) -> str:
        """One line for people."""
        times = sorted(self.milliseconds.items(), key=lambda item: item[1])
        kind = ", ".join(f"{name} {value}" for name, value in self.key)
        why = ", ".join(f"{name} {ms:.3g} ms" for name, ms in times) or "not measured"
        return f"{self.name} ({why}) for {kind}"


_choices: dict[Key, Choice] = {}


def choices() -> tuple[Choice, ...]:
    """What this process has chosen so far, by measuring or by a rule, or found on disk."""
    return tuple(_choices.values())


def ruled(name: str, key: Key) -> None:
    """Tell, once, what a rule decides without measuring."""
    if key not in _choices:
        _choices[key] = Choice(name=name, milliseconds={}, key=key)
        logger.debug("chose %s", _choices[key].describe())


def remembered(key: Key, names: tuple[str, ...]) -> Choice | None:
    """The choice for a kind of call, from this process or from disk; None if there is none.

    Args:
        key: the kind of call.
        names: the candidates there are today; a choice that is not one of them does not count.
    """
    if key not in _choices:
        found = _read(_file(key), key)
        if found is None:
            return None
        _choices[key] = found
        logger.debug("found %s", found.describe())
    choice = _choices[key]
    return choice if choice.name in names else None


def choose(
    key: Key,
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    tie: float = TIE,
) -> Choice:
    """Run the candidates in turns, remember the fastest and return it; the first of a tie.

    A candidate that raises ``RuntimeError`` (of a compiler, or for want of memory) is left out with
    a warning, unless all do. The choice then holds for this process: the next has memory, perhaps.

    Args:
        key: the kind of call.
        candidates: name -> the call.
        device: where they run.
        tie: who takes at most so many times as long as the fastest counts as fast.
    """
    best = _measure(candidates, device)
    fastest = min(best.values())
    name = next(name for name in candidates if best.get(name, math.inf) <= tie * fastest)
    choice = Choice(name=name, milliseconds=best, key=key)
    _choices[key] = choice
    if len(best) == len(candidates):
        _write(_file(key), choice)
    logger.debug("chose %s", choice.describe())
    return choice


def _measure(
    candidates: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, float]:
    """Best milliseconds of every candidate that can run."""
    begin = time.perf_counter()
    best: dict[str, float] = {}
    errors: dict[str, RuntimeError] = {}
    for name, run in candidates.items():
        try:
            best[name] = _milliseconds(run, device)
        except RuntimeError as error:
            errors[name] = error
    if not best:
        raise next(iter(errors.values()))
    for name, reason in errors.items():
        _warn_once(f"{name} cannot run here and is left out: {reason}")
    if len(best) == 1:
        return best
    # The run above has compiled and warmed up; it only counts if there is no time for another.
    if device.type == "cpu" and time.perf_counter() - begin > BUDGET_SECONDS:
        return best
    warm, order = time.perf_counter(), random.Random(0)
    best = {name: _milliseconds(candidates[name], device) for name in best}
    for done in range(1, MAX_ROUNDS):
        now = time.perf_counter()
        alive = list(best)
        if now - warm > SHORT_SECONDS:  # else one hiccup of the machine could decide
            alive = [name for name, ms in best.items() if ms <= GIVE_UP * min(best.values())]
        enough = done >= ROUNDS and now - warm > SHORT_SECONDS
        if len(alive) == 1 or enough or now - begin > BUDGET_SECONDS:
            break
        # Whoever always came after the same other would find the caches as that one leaves them.
        for name in order.sample(alive, len(alive)):
            best[name] = min(best[name], _milliseconds(candidates[name], device))
    return best


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        # What other processes take from one thread does not count; several wait for one another.
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        start = clock()
        run()
        return 1e3 * (clock() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


@functools.cache
def _versions() -> dict[str, str]:
    """Of whatever a time depends on: packages, and the sources of the kernels themselves."""
    found = {
        name: version
        for name, version in installed_versions().items()
        if name in ("torch", "triton")
    }
    found["cuda"] = str(torch.version.cuda)
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return found | {"evdit_opt": digest.hexdigest()[:16]}


def cache_folder() -> Path:
    """Where choices are kept."""
    return Path(user_cache_dir("evdit_opt")) / "autotune"


def _file(key: Key) -> Path:
    text = json.dumps({"versions": _versions(), "key": key})
    return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _read(path: Path, key: Key) -> Choice | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_once(f"cannot read {path}: {error}; measuring instead")
        return None
    except UnicodeDecodeError:
        text = ""
    try:
        record = json.loads(text)
        if record["key"] != dict(key) or record["versions"] != _versions():
            raise ValueError("it is about something else")
        times = {str(name): float(ms) for name, ms in record["milliseconds"].items()}
        if record["name"] not in times:
            raise ValueError("it names no candidate")
        return Choice(name=record["name"], milliseconds=times, key=key)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _warn_once(f"{path} is damaged ({error}); measuring again and rewriting it")
        return None


def _write(path: Path, choice: Choice) -> None:
    record = {
        "name": choice.name,
        "milliseconds": dict(choice.milliseconds),
        "key": dict(choice.key),
        "versions": _versions(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        _warn_once(f"cannot write {path}: {error}; the choice holds for this process only")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
