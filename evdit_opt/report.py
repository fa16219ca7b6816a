"""What one compile did: ``Report``."""

from dataclasses import dataclass

from evdit_opt.passes.decide_site import SiteOutcome

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What happened to the sites of a model.

    Attributes:
        sites: one entry per site that was compiled, or is dense by plan.
        graphs: graphs compiled; more than one means the model broke Dynamo's graph, or saw several
            shapes.
        inner: the backend that compiled the rewritten graph.
        impl: implementation of the sparse attention asked for.
        choices: what "auto" chose so far in this process, and why: one line per kind of call.
        outside: why the model runs without a compiler; empty if it is compiled.
        residual_bytes: memory of all residuals that are kept now.
    """

    sites: tuple[SiteOutcome, ...]
    graphs: int
    inner: str
    impl: str
    choices: tuple[str, ...] = ()
    outside: str = ""
    residual_bytes: int = 0

    @property
    def rewritten(self) -> tuple[str, ...]:
        """Names of the sites that run sparse."""
        return tuple(site.name for site in self.sites if not site.reason)

    @property
    def dense(self) -> dict[str, str]:
        """The reason of every site that runs dense."""
        return {site.name: site.reason for site in self.sites if site.reason}

    def show(self) -> str:
        """The report as text."""
        lines = [
            f"{len(self.rewritten)} of {len(self.sites)} sites sparse, {self.graphs} graphs "
            f"compiled by {self.inner}, implementation {self.impl}"
        ]
        if self.outside:
            lines.append(f"  outside of all graphs: {self.outside}")
        if self.residual_bytes:
            lines.append(f"  residuals take {self.residual_bytes / 2**20:.1f} MiB")
        width = max((len(site.name) for site in self.sites), default=0)
        for site in self.sites:
            rule = "dense" if site.rule is None else site.rule.describe()
            rule += "" if site.second is None else f"; {site.second.describe()}"
            text = f"dense: {site.reason}" if site.reason else f"{rule}, density {site.density:.3f}"
            text += ", in a scope of its own" if site.way == "scope" else ""
            lines.append(f"  {site.name:<{width}}  {text}")
        lines += [f"  auto: {choice}" for choice in self.choices]
        return "\n".join(lines)
