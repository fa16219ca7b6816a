"""The share of attention: what is left out, and that it is what costs the time."""

import pytest
import torch

from evdit_opt.grid import VideoGrid
from evdit_opt.inspection.attention_share import _take_out_marks, measure_share, no_attention
from evdit_opt.passes.canonicalize_attention import canonicalize_attention
from evdit_opt.passes.capture import captured
from evdit_opt.passes.graph import attention_calls, copy_graph, subgraphs
from evdit_opt.passes.marks import add_marks
from evdit_opt.passes.site_mark import MARKS
from tests.models.branching_dit import branching
from tests.models.toy_dit import toy, toy_inputs
from tests.often import often

LONG = VideoGrid(8, 16, 16)
"""2048 tokens of 16 channels: attention is nearly all there is."""


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine would be most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("removed", [False, True], ids=["dense", "without"])
def test_only_the_attention_of_the_sites_goes(removed: bool) -> None:
    model, names = toy(), ["blocks.0.attn1", "blocks.1.attn1"]
    left = []

    def backend(gm, _inputs):
        gm = copy_graph(gm)
        canonicalize_attention(gm)
        _take_out_marks(gm, removed)
        gm.recompile()
        for body in subgraphs(gm):
            assert not [node for node in body.graph.nodes if node.target in MARKS]
            zeros = body.graph.find_nodes(
                op="call_function", target=torch.ops.evdit.no_attention.default
            )
            left.append((len(attention_calls(body.graph)), len(zeros)))
        return gm.forward

    indices = {name: torch.tensor(0) for name in names}
    marks = add_marks(model, dict.fromkeys(names, ""), None, indices)
    with torch.no_grad(), captured(model, backend):
        output = model(**toy_inputs())
    marks.remove()
    assert left == [(2, 2) if removed else (4, 0)]
    changed = (output - model(**toy_inputs())).abs().max()
    assert changed > 1e-3 if removed else changed == 0


def test_nothing_stands_in_for_attention_as_the_compiler_expects_it() -> None:
    q, k, v = (torch.randn(2, 7, 3, 4).transpose(1, 2) for _ in range(3))
    torch.library.opcheck(no_attention, (q, k, v))
    flash = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert no_attention(q, k, v).stride() == flash.stride()


@pytest.mark.parametrize("scoped", often(["scopes"], {"marks": False, "scopes": True}))
def test_long_sequences_spend_their_time_in_attention(scoped: bool, one_thread: None) -> None:
    model = branching(1) if scoped else toy(1)
    names = ["blocks.0.attn1"]
    found = measure_share(
        model,
        names,
        (),
        toy_inputs(LONG),
        scoped=names if scoped else (),
        fullgraph=not scoped,
        seconds=0.5,
    )
    assert 0.4 < found.share < 1
    assert found.share == pytest.approx(1 - found.without_ms / found.dense_ms)
    assert found.max_speedup == pytest.approx(found.dense_ms / found.without_ms)
    assert (found.device, found.dtype, found.rounds >= 5) == ("cpu", "float32", True)
    assert not hasattr(model, "_evdit")
    assert not any(hasattr(module, "_evdit_site") for module in model.modules())
