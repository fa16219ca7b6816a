"""What attention costs in a step: the step, timed with it and without it.

Timing the attention calls by themselves, or reading them off a profile, leaves out what they cost
the rest of the step, and an uncompiled step is slower than it need be. So the denoiser is compiled
twice, by Inductor: as it is, and with the attention of every site replaced by an operator that
takes the same q, k and v and returns zeros in the layout attention would have. Nothing else
differs, not even what computes q, k and v. The two run in turn; what is saved is the most any mask
could save.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from evdit_opt.passes.canonicalize_attention import canonicalize_attention
from evdit_opt.passes.capture import compile_call
from evdit_opt.passes.graph import Attention, copy_graph, insert_call, read_attention, subgraphs
from evdit_opt.passes.marks import SiteMark, add_marks
from evdit_opt.passes.scopes import add_scopes, dense
from evdit_opt.passes.site_mark import MarkFacts, remove_mark
from evdit_opt.passes.stand_in import settle
from evdit_opt.passes.swap_attention import match_marks
from evdit_opt.timing import interleaved_ms

__all__ = ["AttentionShare", "measure_share"]

METHOD = "median of interleaved calls compiled by Inductor, with the sites' attention and without"
MAX_ROUNDS, MIN_ROUNDS = 41, 5


@dataclass(frozen=True)
class AttentionShare:
    """One denoiser call, timed.

    Attributes:
        dense_ms: the call as it is, milliseconds.
        without_ms: the same without the attention of its sites.
        share: of the call that the sites' attention takes, 0 to 1.
        max_speedup: of the call, if that attention cost nothing (Amdahl): 1 / (1 - share).
        rounds: calls of each kind that were timed.
        device: where it ran.
        dtype: of the video.
        threads: of PyTorch on the CPU.
        method: how it was measured.
    """

    dense_ms: float
    without_ms: float
    share: float
    max_speedup: float
    rounds: int
    device: str
    dtype: str
    threads: int
    method: str = METHOD


@torch.library.custom_op("evdit::no_attention", mutates_args=())
def no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros ``[batch, heads, seq, head_dim]`` that need q, k and v, as far as a compiler knows.

    Laid out in memory as ``[batch, seq, heads, head_dim]``, like the output of flash attention.
    """
    batch, heads, length, _ = q.shape
    return v.new_zeros(batch, length, heads, v.shape[-1]).transpose(1, 2)


@no_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, _ = q.shape
    return v.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)


def measure_share(
    model: nn.Module,
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    scoped: Collection[str] = (),
    fullgraph: bool = True,
    seconds: float = 20.0,
) -> AttentionShare:
    """Time one call of ``model`` with and without the attention of its sites.

    Args:
        model: the denoiser, dense.
        names: module paths of its sites.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        scoped: those of ``names`` that are reached in a scope.
        fullgraph: whether Dynamo traces the model whole.
        seconds: about how long to time, compiling not counted; at least 5 rounds run.
    """
    switch = _Switch()
    indices = {name: torch.tensor(0) for name in names}
    marks = add_marks(model, {name: "" for name in names if name not in scoped}, None, indices)
    try:
        add_scopes(model, marks, dict.fromkeys(scoped, ""), switch.attend, indices)
        calls = {
            way: compile_call(model, _backend(removed), fullgraph, dynamic=False)
            for way, removed in (("dense", False), ("without", True))
        }

        def run(way: str) -> Callable[[], object]:
            def call() -> object:
                switch.removed = way == "without"
                return calls[way](*args, **kwargs)

            return call

        actions = {way: run(way) for way in calls}
        with torch.no_grad():
            for action in actions.values():
                action()  # compiles
            start = perf_counter()
            interleaved_ms(actions, rounds=1, warmup=0)
            round_seconds = perf_counter() - start
            rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / round_seconds)))
            times = interleaved_ms(actions, rounds, warmup=1)
    finally:
        marks.remove()
    parameter = next(model.parameters())
    share = max(0.0, 1.0 - times["without"] / times["dense"])
    return AttentionShare(
        dense_ms=times["dense"],
        without_ms=times["without"],
        share=share,
        max_speedup=1.0 / (1.0 - share),
        rounds=rounds,
        device=_device_name(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


class _Switch:
    """Whether attention that runs outside all graphs is to be left out."""

    def __init__(self) -> None:
        self.removed = False

    def attend(self, _site: SiteMark, attention: Attention, _facts: MarkFacts) -> Tensor:
        if self.removed:
            return no_attention(attention.q, attention.k, attention.v)
        return dense(attention)


def _backend(removed: bool) -> Callable[..., Any]:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        gm = copy_graph(gm)
        stand_ins = canonicalize_attention(gm)
        _take_out_marks(gm, removed)
        settle(stand_ins)
        gm.recompile()
        compiled: Any = compile_fx(gm, list(example_inputs))
        return compiled  # type: ignore[no-any-return]

    return backend


def _take_out_marks(gm: fx.GraphModule, removed: bool) -> None:
    """Take the marks out of a graph, and where ``removed``, the attention of every mark with it.

    before:  out = scaled_dot_product_attention(q, k, v)
    after:   out = evdit.no_attention(q, k, v)
    """
    for body in subgraphs(gm):
        for mark, calls in match_marks(body.graph):
            for call in calls if removed else ():
                attention = read_attention(call)
                with body.graph.inserting_before(call):
                    qkv = (attention.q, attention.k, attention.v)
                    zeros = insert_call(body.graph, torch.ops.evdit.no_attention.default, qkv, call)
                call.replace_all_uses_with(zeros)
                body.graph.erase_node(call)
            remove_mark(mark)
        body.recompile()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
