"""``evdit inspect``: what could become of a model, before anything is calibrated."""

from evdit_opt.inspection.examine import Inspection, examine
from evdit_opt.inspection.show import show
from evdit_opt.inspection.target import load_target

__all__ = ["Inspection", "examine", "load_target", "show"]
