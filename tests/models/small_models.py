"""The video transformers of diffusers, tiny and random, and what is to be found in each."""

from tests.models.case import Case
from tests.models.hunyuan_models import HUNYUAN_CASES
from tests.models.joint_models import JOINT_CASES
from tests.models.left_alone_models import LEFT_ALONE_CASES
from tests.models.other_models import OTHER_CASES
from tests.models.wan_models import WAN_CASES

CASES: tuple[Case, ...] = (
    *WAN_CASES,
    *HUNYUAN_CASES,
    *JOINT_CASES,
    *OTHER_CASES,
    *LEFT_ALONE_CASES,
)
BY_NAME = {case.name: case for case in CASES}
