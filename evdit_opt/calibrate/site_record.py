"""What calibration keeps of one site: how far every candidate mask moves its attention output.

One dense recording pass gives q, k, v of every site. A few positions of every frame are looked at
(see ``parts.py``), and only running sums are kept, so memory does not grow with prompts. For reuse
across steps it takes the residuals of all steps of one run: a fixed sample of their numbers.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evdit_opt.calibrate.parts import Parts, tile_parts
from evdit_opt.calibrate.strengths import FittedRules
from evdit_opt.grid import TokenLayout
from evdit_opt.masks import Rule

__all__ = ["CandidateError", "HeadErrors", "ReuseError", "SiteRecord"]

POSITIONS = 8
"""Positions of every frame whose queries score rules, the same ones in all frames and calls."""

EVERY = 2
"""Of how many steps of a run one measures the rules that are applied in every step; the next run
takes other steps. Residuals are compared between all steps, so these are looked at in each."""

FITTED_POSITIONS = 1
"""How many of them say what strengths do; see ``strengths.py``."""

SKETCH = 2048
"""Numbers of a step's residual that are kept, of every frame as many."""


@dataclass(frozen=True)
class CandidateError:
    """What one rule costs at one site, relative to dense attention on the same q, k, v.

    Attributes:
        rule: the candidate.
        density: kept / all token pairs at the calibrated layout, text included.
        output: ``||sparse - dense|| / ||dense||`` over video tokens, all recorded calls (the
            paper's Algorithm 1 thresholds a loss of this kind; relative, so a threshold means the
            same on every model).
        temporal: the same for the change from each latent frame to the next at the same position.
            Its numerator sees errors that differ between frames, which become flicker, and is
            blind to errors that stay the same along the clip.
    """

    rule: Rule
    density: float
    output: float
    temporal: float


@dataclass(frozen=True)
class HeadErrors:
    """What every rule costs at every head of a site.

    Squared errors of heads add up to the site's: they are those of the attention's output, where
    heads lie side by side. What the output projection makes of them is not looked at.

    Attributes:
        rules: the candidates of all weightings that are not fitted, and those for single heads.
        densities: of each, at the calibrated layout.
        squares: ``[heads, rules, 2]``, float64: squared error of a head's output and of its change
            from frame to frame, both relative to those of the whole site.
    """

    rules: tuple[Rule, ...]
    densities: tuple[float, ...]
    squares: Tensor


@dataclass(frozen=True)
class ReuseError:
    """What one rule costs at one site that reuses its residual, by step.

    Attributes:
        rule: the candidate.
        density: as in :class:`CandidateError`.
        output: ``[steps, steps]``, float64: the squared relative error in step t (column) with the
            residual of step s (row); relative to the dense output of step t.
        temporal: the same for the change from frame to frame.
        scales: ``[2, steps]``, float64: the squared norms of the dense output and of its change,
            by step, which ``output`` and ``temporal`` are relative to.
    """

    rule: Rule
    density: float
    output: Tensor
    temporal: Tensor
    scales: Tensor


class SiteRecord:
    """Running sums of one site over the calls of the dense model.

    Those of single heads are two numbers for every head and rule: 26 kB at 40 heads and 40 rules.

    Args:
        layout: of its tokens.
        rules: candidates that are applied in every step.
        reused: candidates between refreshes; none if the model is no denoiser with steps.
        seed: of the choice of positions and numbers.
        positions: of every frame whose queries are looked at; None: ``POSITIONS``.
        for_heads: further candidates, for single heads only.
    """

    def __init__(
        self,
        layout: TokenLayout,
        rules: Sequence[Rule],
        reused: Sequence[Rule] = (),
        seed: int = 0,
        positions: int | None = None,
        for_heads: Sequence[Rule] = (),
    ) -> None:
        self.layout, self.rules, self.reused = layout, tuple(rules), tuple(reused)
        self.calls = 0
        self.runs = 0
        self.once_a_step = self.own_keys = True
        frames = layout.grid.frames
        self._random = torch.Generator().manual_seed(seed)
        tokens = layout.grid.tokens_per_frame
        self._positions = torch.randperm(tokens, generator=self._random)[: positions or POSITIONS]
        # Fitted rules need no outputs of their own, but those that they lie between.
        self._fitted = FittedRules(self.rules, frames)
        plain = [rule for rule in self.rules if rule.weighting != "fitted"]
        applied = tuple(dict.fromkeys((*plain, *self._fitted.bases, *for_heads)))
        self._applied = {rule: row for row, rule in enumerate(applied)}
        # The dense mask comes first, then the rules, then what is reused.
        dense = torch.zeros(frames, frames)
        masks = [_bias(rule, frames) for rule in (*applied, *self.reused)]
        self._bias = torch.stack([dense, *masks])
        self._error: Tensor | None = None  # [heads, rules, 2]
        self._between: Tensor | None = None  # what the fitted rules are told by
        self._scale = torch.zeros(2, dtype=torch.float64)
        self._mass: Tensor | None = None
        self._kept: dict[int, Tensor] = {}  # by first head: which numbers the sketch keeps
        self._run: dict[Hashable, dict[int, Tensor]] = {}  # sketches by generation and step
        self._drift: Tensor | None = None
        self._drift_scale: Tensor | None = None

    def add(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        generation: Hashable = None,
        step: int = 0,
    ) -> None:
        """Measure every candidate on one call.

        Args:
            q: ``[batch, heads, seq, head_dim]``.
            k: ``[batch, kv_heads, seq, head_dim]``.
            v: ``[batch, kv_heads, seq, head_dim]``.
            attn_mask: the model's own key-padding mask, or None.
            scale: softmax scale, None for ``head_dim ** -0.5``.
            generation: which denoising run and guidance branch the call belongs to.
            step: number of its step.
        """
        self.calls += 1
        self.own_keys &= q.shape[1] == k.shape[1]
        sketches, mass, errors, head = [], [], [], 0
        takes_rules = not self.reused or (self.runs + step) % EVERY == 0
        for parts in tile_parts(q, k, v, self.layout, self._positions, attn_mask, scale):
            dense, static, reused = self._outputs(parts, takes_rules)
            if takes_rules:
                self._scale += _squares(dense).sum(0)
            if len(static):
                errors.append(torch.stack([_squares(own - dense) for own in static], 1))
            mass.append(parts.mass().cpu())
            if self.reused:
                residuals = torch.cat([dense.unsqueeze(0), dense - reused])
                sketches.append(self._sketch(residuals, head, q.shape[1]))
            head += dense.shape[1]
        total = torch.cat(mass)
        self._mass = total if self._mass is None else self._mass + total
        if errors:
            added = torch.cat(errors)
            self._error = added if self._error is None else self._error + added
        if self.reused:
            steps = self._run.setdefault(generation, {})
            self.once_a_step &= step not in steps
            steps[step] = torch.cat(sketches, -1)

    def end_run(self) -> None:
        """A denoising run is over: compare the residuals of all its steps."""
        for steps in self._run.values():
            if list(steps) == list(range(len(steps))):
                self._compare(torch.stack(list(steps.values())))
        self._run = {}
        self.runs += 1

    def state(self) -> dict[str, Tensor]:
        """All sums between two runs, to go on from with :meth:`load_state`."""
        counts = torch.tensor([self.calls, self.runs, self.once_a_step, self.own_keys])
        found = {"counts": counts, "scale": self._scale}
        optional = {"error": self._error, "mass": self._mass, "drift": self._drift,
                    "drift_scale": self._drift_scale, "between": self._between}  # fmt: skip
        found |= {name: value for name, value in optional.items() if value is not None}
        return found | {f"kept.{head}": numbers for head, numbers in self._kept.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state`, in a record made with the same arguments."""
        self.calls, self.runs, once_a_step, own_keys = state["counts"].tolist()
        self.once_a_step, self.own_keys = bool(once_a_step), bool(own_keys)
        self._error, self._scale = state.get("error"), state["scale"]
        self._mass, self._between = state.get("mass"), state.get("between")
        self._drift, self._drift_scale = state.get("drift"), state.get("drift_scale")
        self._kept = {
            int(name.removeprefix("kept.")): numbers
            for name, numbers in state.items()
            if name.startswith("kept.")
        }

    def errors(self) -> tuple[CandidateError, ...]:
        """Of all rules over the calls added so far, in the order given."""
        none = torch.zeros(1, len(self._applied), 2, dtype=torch.float64)
        error = none if self._error is None else self._error
        squares = dict(zip(self._applied, error.sum(0), strict=True))
        if self._between is not None:
            bases = torch.stack([squares[rule] for rule in self._fitted.bases])
            fitted = self._fitted.errors(self._between, bases)
            squares |= dict(zip(self._fitted.rules, fitted, strict=True))
        found = []
        for rule in self.rules:
            output, temporal = (squares[rule] / self._scale.clamp_min(1e-300)).sqrt().tolist()
            found.append(CandidateError(rule, rule.density(self.layout), output, temporal))
        return tuple(found)

    def head_errors(self) -> HeadErrors | None:
        """Of single heads; None where there is nothing to choose between.

        That is one head, or heads that share keys, which no plan takes apart.
        """
        if self._error is None or len(self._error) < 2 or not self.own_keys:
            return None
        rules = tuple(self._applied)
        return HeadErrors(
            rules=rules,
            densities=tuple(rule.density(self.layout) for rule in rules),
            squares=self._error / self._scale.clamp_min(1e-300),
        )

    def reuse_errors(self) -> tuple[ReuseError, ...]:
        """Of everything reused, over the runs that have ended; none without runs of two steps."""
        if self._drift is None or self._drift_scale is None or not self.once_a_step:
            return ()
        relative = self._drift / self._drift_scale.clamp_min(1e-300)
        scales = self._drift_scale[:, 0, 0]
        return tuple(
            ReuseError(rule, rule.density(self.layout), relative[0, row], relative[1, row], scales)
            for row, rule in enumerate(self.reused)
        )

    def mass(self) -> Tensor:
        """Share of attention by tile, ``[heads, frames, parts]``, mean over all calls."""
        assert self._mass is not None, "nothing was recorded"
        return self._mass / self.calls

    def _outputs(self, parts: Parts, takes_rules: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Dense, under every rule, and under everything reused: ``[..., frames, positions, d]``."""
        rules = tuple(self._applied) if takes_rules else ()
        bias = torch.cat([self._bias[: 1 + len(rules)], self._bias[1 + len(self._applied) :]])
        shares = parts.shares(bias.to(parts.lse.device))
        found = parts.mix(shares)
        nothing = [n for n, rule in enumerate((None, *rules, *self.reused)) if _is_empty(rule)]
        found[nothing] = 0.0
        dense, static, reused = found.split([1, len(rules), len(self.reused)])
        if takes_rules and self._fitted.rules:
            rows = [self._applied[rule] for rule in self._fitted.bases]
            few = (..., slice(FITTED_POSITIONS), slice(None))
            plain = shares[1:][few][rows[: len(rows) // 2]]
            added = self._fitted.squares(dense[0][few], static[few][rows], plain)
            self._between = added if self._between is None else self._between + added
        return dense[0], static, reused

    def _sketch(self, residuals: Tensor, head: int, heads: int) -> Tensor:
        """A fixed sample of every frame's numbers, ``[1 + reused, frames, sample]``, on the CPU."""
        numbers = residuals.movedim(3, 1).flatten(2)  # [.., frames, batch * heads * positions * d]
        if head not in self._kept:
            share = residuals.shape[2] / heads
            sample = max(1, round(SKETCH * share / self.layout.grid.frames))
            order = torch.randperm(numbers.shape[-1], generator=self._random)
            self._kept[head] = order[:sample]
        return numbers[..., self._kept[head].to(numbers.device)].cpu()

    def _compare(self, run: Tensor) -> None:
        """Add the squared distances between the residuals of all steps of one generation."""
        steps = run.shape[0]
        if steps < 2 or (self._drift is not None and self._drift.shape[-1] != steps):
            return
        if self._drift is None or self._drift_scale is None:
            self._drift = torch.zeros(2, len(self.reused), steps, steps, dtype=torch.float64)
            self._drift_scale = torch.zeros(2, 1, 1, steps, dtype=torch.float64)
        run = run.double()
        for row, signal in enumerate((run, run.diff(dim=2))):
            dense, *residuals = signal.flatten(2).unbind(1)  # each [steps, numbers]
            self._drift_scale[row] += dense.square().sum(-1)
            for column, residual in enumerate(residuals):
                self._drift[row, column] += torch.cdist(residual, residual).square()


def _bias(rule: Rule, frames: int) -> Tensor:
    # What keeps nothing has no softmax: its output is set to 0 later.
    return torch.zeros(frames, frames) if rule.keeps_nothing else rule.mask(frames).bias


def _is_empty(rule: Rule | None) -> bool:
    return rule is not None and rule.keeps_nothing


def _squares(frames: Tensor) -> Tensor:
    """Sums of squares of a signal and of its frame-to-frame change: ``[heads, 2]``, fp64, CPU.

    Args:
        frames: ``[batch, heads, frames, positions, head_dim]``.
    """
    signals = frames, frames.diff(dim=2)
    return torch.stack([own.square().sum((0, 2, 3, 4)) for own in signals], 1).double().cpu()
