"""Every exception this package raises on purpose.

A message says what was expected, what came, and what to do about it.
"""

__all__ = [
    "AlreadyOptimizedError",
    "CalibrationError",
    "DistillationError",
    "EvditError",
    "LayoutError",
    "MaskError",
    "NoVideoAttentionError",
    "NonFiniteOutputError",
    "PlanError",
    "PlanMismatchError",
    "PlanNotFoundError",
    "QualityFloorError",
    "SchedulerError",
    "UnsupportedInputError",
    "VideoError",
]


class EvditError(Exception):
    """Base class of every error raised by evdit_opt."""


class MaskError(EvditError, ValueError):
    """A grid, rule, tile mask or attention call is not well formed."""


class PlanError(EvditError, ValueError):
    """A plan file is damaged, too large, of another version, or holds invalid values."""


class PlanNotFoundError(PlanError, FileNotFoundError):
    """There is no plan file where one was expected."""


class PlanMismatchError(EvditError, RuntimeError):
    """A plan does not fit the model: other class, missing site, a planned site not rewritten."""


class LayoutError(EvditError, RuntimeError):
    """The token layout (frames, height, width, text) of an attention could not be established."""


class NoVideoAttentionError(EvditError, ValueError):
    """The model has no 3D full self-attention this package can rewrite."""


class UnsupportedInputError(EvditError, TypeError):
    """What was handed in is not a video pipeline or module this package can call."""


class AlreadyOptimizedError(EvditError, RuntimeError):
    """A plan is already applied to this model; call ``evdit_opt.restore(model)`` first."""


class CalibrationError(EvditError, ValueError):
    """Calibration cannot start or finish with what was given (no prompts, too few, ...)."""


class NonFiniteOutputError(CalibrationError):
    """The model produced NaN or infinity during calibration or verification."""


class SchedulerError(EvditError, ValueError):
    """A few-step schedule is not well formed, or its scheduler is used out of order."""


class DistillationError(EvditError, RuntimeError):
    """Training cannot start or go on; what was trained so far is kept where the message says."""


class VideoError(DistillationError):
    """A video cannot be read, or is too short; others may do."""


class QualityFloorError(CalibrationError):
    """No plan within the quality floor was found.

    Attributes:
        plan: of the plans that were tried the best: of the highest mean PSNR to the held-out dense
            clips.
    """

    def __init__(self, message: str, plan: object) -> None:
        super().__init__(message)
        self.plan = plan
