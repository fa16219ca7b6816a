"""``evdit report``: a plan as one HTML page that needs nothing else, no network either."""

from evdit_opt.page.clips import Clip, load_clips
from evdit_opt.page.load import load_measurement, load_share
from evdit_opt.page.page import plan_page

__all__ = ["Clip", "load_clips", "load_measurement", "load_share", "plan_page"]
