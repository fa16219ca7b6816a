"""`FewStepScheduler` under the name that saved pipelines record, without importing diffusers.

The class derives from diffusers' mixins, so it is made on first use. diffusers loads a component
of a foreign library only if its module is in ``sys.modules`` and offers ``SchedulerMixin``, by
which it knows how to load it; `import evdit_opt` is all a person needs before ``from_pretrained``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from evdit_opt.sampling.few_step import FewStepScheduler

__all__ = ["FewStepScheduler", "SchedulerMixin"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from evdit_opt.sampling import few_step

        return getattr(few_step, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
