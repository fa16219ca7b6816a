"""The mark itself and its hooks; what they are for is tested in tests/test_apply.py."""

import copy
import threading

import pytest
import torch

from evdit_opt.errors import PlanMismatchError
from evdit_opt.masks import Rule
from evdit_opt.passes.marks import LiveGrid, add_marks
from evdit_opt.passes.site_mark import SiteSpec
from tests.models.toy_dit import toy, toy_inputs


def test_another_backend_does_not_silently_drop_a_mark() -> None:
    model = toy(1)
    root = add_marks(model, {"blocks.0.attn1": SiteSpec(Rule()).encode()}, None)
    with torch.no_grad(), pytest.raises(PlanMismatchError, match="another backend"):
        torch.compile(model, backend="eager")(**toy_inputs())
    root.remove()
    model(**toy_inputs())


def test_unknown_modules_are_named_and_nothing_is_hooked() -> None:
    model = toy(1)
    with pytest.raises(PlanMismatchError, match=r"blocks\.4\.attn1"):
        add_marks(model, {"blocks.0.attn1": "", "blocks.4.attn1": ""}, None)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_each_thread_has_its_forward_and_threads_without_one_the_last() -> None:
    live = LiveGrid()
    live.start(3, 20)
    seen = []

    def forward() -> None:
        live.start(5, 12)
        seen.append((live.read(), live.running))
        live.stop()
        seen.append((live.read(), live.running))

    for work in (forward, lambda: seen.append((live.read(), live.running))):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [((5, 12), True), ((5, 12), False), ((5, 12), False)]
    assert (live.read(), live.running) == ((3, 20), True)
    assert copy.deepcopy(live).read() == (0, 0)
