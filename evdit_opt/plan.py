"""The plan: what calibration decided, why, and how good it was.

Calibration writes it, compilation reads it, nothing else passes between them.
A plan is frozen, prints as JSON, and is safe to load from a stranger: see :meth:`Plan.load`.
"""

import hashlib
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from evdit_opt import strict_json
from evdit_opt.errors import PlanError, PlanMismatchError, PlanNotFoundError
from evdit_opt.grid import VideoGrid
from evdit_opt.masks import MAX_FRAMES, Rule
from evdit_opt.passes.grid_source import GridSource
from evdit_opt.plan_records import (
    MAX_TOKENS,
    CalibrationRecord,
    FinetuneRecord,
    ReuseRecord,
    SpeedRecord,
    TrendPoint,
    TrialRecord,
    require_int,
    require_text,
)
from evdit_opt.quality import QualityReport
from evdit_opt.second_rule import SecondRule
from evdit_opt.site_plan import RuleEvidence, SiteLayout, SitePlan

__all__ = [
    "PLAN_FILE",
    "CalibrationRecord",
    "FinetuneRecord",
    "Plan",
    "ReuseRecord",
    "RuleEvidence",
    "SecondRule",
    "SiteLayout",
    "SitePlan",
    "SpeedRecord",
    "TrendPoint",
    "TrialRecord",
]

SCHEMA_VERSION = 2
PLAN_FILE = "evdit_plan.json"
"""Name of a plan beside a checkpoint."""

MAX_BYTES = 4 * 2**20
MAX_SITES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A rule per site, and the evidence for it.

    Attributes:
        model_class: class name of the model.
        model_config_hash: hash of its configuration.
        sites: every 3D self-attention of the model, in model order.
        grid: the latent grid its densities hold at.
        grid_source: how a forward's grid is read from its arguments.
        min_tokens: sequence length in tokens below which sites run dense.
        fullgraph: True if the model was captured as one graph.
        calibration: how the plan was found.
        finetune: the weights and the schedule it is for; None: those the model came with.
        reuse: which sites carry what their mask drops from step to step; None: none does.
        quality: held-out clips compared with their dense twins; None if not verified.
        speed: measured speed; None if not measured.
        predicted: the speed that calibration expected; None if it went by density.
        calibrated_at: the latent grid it was calibrated at, where that is not ``grid``: see
            ``retarget``.
        versions: names and versions of the packages it was made with, sorted by name.
        schema_version: of the file format.

    Raises:
        PlanError: if a value is outside its range.
    """

    model_class: str
    model_config_hash: str
    sites: tuple[SitePlan, ...]
    grid: VideoGrid
    grid_source: GridSource
    min_tokens: int
    fullgraph: bool
    calibration: CalibrationRecord
    reuse: ReuseRecord | None = None
    quality: QualityReport | None = None
    speed: SpeedRecord | None = None
    predicted: SpeedRecord | None = field(default=None, metadata={strict_json.OPTIONAL: True})
    calibrated_at: VideoGrid | None = field(default=None, metadata={strict_json.OPTIONAL: True})
    versions: tuple[tuple[str, str], ...] = ()
    schema_version: int = SCHEMA_VERSION
    finetune: FinetuneRecord | None = field(default=None, metadata={strict_json.OPTIONAL: True})

    def __post_init__(self) -> None:
        require_int("schema_version", self.schema_version, SCHEMA_VERSION, SCHEMA_VERSION)
        require_text("model_class", self.model_class, 256)
        require_text("model_config_hash", self.model_config_hash, 128)
        require_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        for grid in (self.grid, self.calibrated_at or self.grid):
            require_int("grid.frames", grid.frames, 1, MAX_FRAMES)
            require_int("tokens of the grid", grid.tokens, 1, MAX_TOKENS)
        if not 1 <= len(self.sites) <= MAX_SITES:
            raise PlanError(f"expected 1 to {MAX_SITES} sites, got {len(self.sites)}")
        [(name, count)] = Counter(site.name for site in self.sites).most_common(1)
        if count > 1:
            raise PlanError(f"expected every site once, got {name!r} {count} times")
        if self.reuse is not None:
            without = sorted(set(self.reuse.sites) - set(self.rules))
            if without:
                raise PlanError(f"expected a rule at every site that reuses, {without[0]} has none")
            split = sorted(set(self.reuse.sites) & set(self.second_rules))
            if split:
                raise PlanError(
                    f"expected one rule for all heads at every site that reuses, {split[0]} has two"
                )
        reusing = () if self.reuse is None else self.reuse.sites
        for name, rule in self.rules.items():
            if rule.keeps_nothing and name not in reusing:
                raise PlanError(
                    f"expected {name}, whose rule keeps nothing, among those that reuse"
                )
        if len(self.versions) > 100 or list(self.versions) != sorted(dict(self.versions).items()):
            raise PlanError("expected versions of at most 100 packages, each once, sorted by name")
        for package, version in self.versions:
            require_text("versions", package, 100)
            require_text(f"versions.{package}", version, 100)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan. Nothing in the file is executed, and no part of a bad file is used.

        Raises:
            PlanNotFoundError: if there is no file (also a ``FileNotFoundError``).
            PlanError: if it is too large, damaged, of another schema version, or holds a value that
                is unknown, doubled, of the wrong type or out of range; names file and field.
        """
        try:
            return cls.from_json(_read(Path(path)))
        except PlanNotFoundError:
            raise
        except PlanError as error:
            raise PlanError(f"{os.fspath(path)}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan so that ``path`` holds the old file or the whole new one, never a part."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("x", encoding="utf-8", newline="\n") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def push(self, folder: str | os.PathLike[str]) -> Path:
        """Save as ``evdit_plan.json`` in a checkpoint's folder; returns the path."""
        path = Path(folder) / PLAN_FILE
        self.save(path)
        return path

    @classmethod
    def pull(cls, folder: str | os.PathLike[str]) -> "Plan":
        """Load ``evdit_plan.json`` from a checkpoint's folder."""
        return cls.load(Path(folder) / PLAN_FILE)

    def to_json(self) -> str:
        """The plan as text: sorted keys, a piece of evidence a line, so that versions diff well."""
        text = strict_json.dump(self)
        if len(text.encode()) > MAX_BYTES:
            raise PlanError(f"expected a plan of at most {MAX_BYTES} bytes, got {len(text)}")
        return text

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Inverse of :meth:`to_json`.

        Raises:
            PlanError: as :meth:`load`, without a file name.
        """
        value = strict_json.parse(text)
        if not isinstance(value, dict) or "schema_version" not in value:
            raise PlanError("expected an object with a schema_version; this is not an evdit plan")
        version = value["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise PlanError(
                f"expected schema_version {SCHEMA_VERSION}, got {strict_json.shorten(version)}; "
                "install the evdit-opt that wrote this plan, or make it again with make_plan"
            )
        plan: Plan = strict_json.build(cls, value, "plan")
        return plan

    @property
    def density(self) -> float:
        """Mean over sites, each counted once; a dense site counts 1.

        Of a plan that reuses also the mean over the steps of the run it was found for.
        """
        return self.density_over(() if self.reuse is None else self.reuse.levels)

    def density_over(self, levels: Sequence[float]) -> float:
        """Kept share of token pairs, mean over the sites and the steps of a run.

        A refresh counts the dense attention and the mask.

        Args:
            levels: noise levels of the run's steps, descending; empty: one step between refreshes.
        """
        between = sum(site.density for site in self.sites) / len(self.sites)
        if self.reuse is None or not levels:
            return between
        reusing = set(self.reuse.sites)
        kept = {
            "dense": 1.0,
            "reuse": between,
            "refresh": between + len(reusing) / len(self.sites),
        }
        modes = self.reuse.modes(levels)
        return sum(kept[mode] for mode in modes) / len(modes)

    @property
    def rules(self) -> dict[str, Rule]:
        """The rule of every site that has one, by name; of those with two the first."""
        return {site.name: site.rule for site in self.sites if site.rule is not None}

    @property
    def second_rules(self) -> dict[str, SecondRule]:
        """What some heads of a site do instead, by name of the site."""
        return {site.name: site.second for site in self.sites if site.second is not None}

    def fingerprint(self) -> str:
        """SHA-256, in hex, of what changes the model's numbers: neither evidence nor versions."""
        content = _Numerics(
            model_class=self.model_class,
            model_config_hash=self.model_config_hash,
            sites=tuple((site.name, site.rule, site.layout) for site in self.sites),
            grid_source=self.grid_source,
            min_tokens=self.min_tokens,
            reuse=None if self.reuse is None else replace(self.reuse, levels=(), memory=None),
            second=tuple(self.second_rules.items()),
        )
        return hashlib.sha256(strict_json.dump(content).encode()).hexdigest()

    def require_match(
        self,
        model_class: str,
        site_names: Iterable[str],
        model_config_hash: str | None = None,
    ) -> None:
        """Check that the plan was made for this model.

        Raises:
            PlanMismatchError: naming what differs.
        """
        found, planned = set(site_names), {site.name for site in self.sites}
        problems = []
        if model_class != self.model_class:
            problems.append(f"expected a {self.model_class}, got a {model_class}")
        if planned - found:
            problems.append(f"the model lacks the planned sites {_few(planned - found)}")
        if found - planned:
            problems.append(f"the plan lacks the model's sites {_few(found - planned)}")
        if not problems and model_config_hash not in (None, self.model_config_hash):
            problems.append(
                f"expected a {model_class} whose configuration hashes to {self.model_config_hash}, "
                f"got {model_config_hash}"
            )
        if problems:
            raise PlanMismatchError(
                f"this plan is for another model: {'; '.join(problems)}. Load the plan of this "
                "model or make one with evdit_opt.make_plan"
            )

    def describe(self) -> str:
        """The plan as a table for people."""
        grid = self.calibrated_at or self.grid
        head = [
            f"plan {self.fingerprint()[:12]} for {self.model_class}",
            f"calibrated at {grid.frames} x {grid.height} x {grid.width} tokens, "
            f"{self.calibration.prompt_count} prompts, {self.calibration.steps} steps, "
            f"threshold {self.calibration.threshold:.3g}",
            f"mean density {self.density:.3f}, {len(self.rules)} of {len(self.sites)} sites sparse",
        ]
        if self.calibration.call:
            head.insert(2, f"called with {self.calibration.describe_call()}")
        if self.calibrated_at is not None:
            grid = self.grid
            head.insert(
                2,
                f"extrapolated to {grid.frames} x {grid.height} x {grid.width} tokens, where "
                f"{'nothing' if self.quality is None else 'only the quality'} was measured",
            )
        if self.reuse is not None:
            head.append(
                f"{len(self.reuse.sites)} sites reuse what their mask drops, renewed at "
                f"{len(self.reuse.refresh_at)} noise levels from {self.reuse.refresh_at[0]:.4g}"
            )
            size = self.reuse.memory
            head.append(
                f"residuals in precision {self.reuse.precision}"
                + ("" if size is None else f", {size / 2**20:.4g} MiB in a run")
                + (", carried on between refreshes" if self.reuse.trend else "")
            )
        if self.finetune is not None:
            head.append(
                f"for fine-tuned weights, {self.finetune.steps} steps"
                + ("; call the pipeline with guidance_scale=1" * self.finetune.consistency)
            )
        if self.quality is not None:
            head.append(f"held-out quality: {self.quality.describe()}")
        for what, speed in (("speed", self.speed), ("predicted speed", self.predicted)):
            if speed is not None:
                head.append(
                    f"{what}: {speed.dense_ms:.1f} -> {speed.optimized_ms:.1f} ms a forward, "
                    f"{speed.speedup:.2f}x on {speed.device}"
                )
        rows = [("site", "mask", "density", "reason")]
        for site in self.sites:
            mask = site.describe(grid.frames)
            rows.append((site.name, mask, f"{site.density:.3f}", site.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [
            f"{name:<{widths[0]}}  {mask:<{widths[1]}}  {density:>{widths[2]}}  {reason}"
            for name, mask, density, reason in rows
        ]
        return "\n".join([*head, "", *table])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Numerics:
    model_class: str
    model_config_hash: str
    sites: tuple[tuple[str, Rule | None, SiteLayout], ...]
    grid_source: GridSource
    min_tokens: int
    reuse: ReuseRecord | None
    second: tuple[tuple[str, SecondRule], ...] = field(
        default=(), metadata={strict_json.OPTIONAL: True}
    )  # not written where there is none, so that older plans keep their fingerprint


def _read(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PlanError("expected a plan file, got a folder or device")
        if status.st_size > MAX_BYTES:
            raise PlanError(f"expected at most {MAX_BYTES} bytes, got {status.st_size}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise PlanError(f"expected at most {MAX_BYTES} bytes, got more")
        return content.decode("utf-8")
    except FileNotFoundError as error:
        raise PlanNotFoundError(
            f"expected a plan at {path}, found no file; make one with evdit_opt.make_plan"
        ) from error
    except UnicodeDecodeError as error:
        raise PlanError(f"expected UTF-8 text, got something else: {error}") from error
    except OSError as error:
        raise PlanError(f"expected a readable file: {error}") from error


def _few(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
