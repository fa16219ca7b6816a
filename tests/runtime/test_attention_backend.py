"""``set_attention_backend``: diffusers calls another function, or another operator, to attend."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import Tensor

from evdit_opt.passes.find_attention import classify_eager, find_attention
from tests.models.case import Shape
from tests.often import often
from tests.runtime.pair import WAN, Pair

BACKENDS = ("_native_math", "_native_flash", "flex", "_flash_3")


def flash_3(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, *_: object
) -> tuple[Tensor, Tensor]:
    """Stands in on the CPU for a kernel that needs a GPU; ``[batch, seq, heads, head_dim]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.transpose(1, 2).contiguous(), q.new_zeros(q.shape[:3])


@pytest.fixture(autouse=True)
def dispatcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU kernel for diffusers' operator; its process-wide default is put back."""
    registry = attention_dispatch._AttentionBackendRegistry
    default, _ = registry.get_active_backend()
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", True)
    library = torch.library.Library("_diffusers_flash_attn_3", "FRAGMENT")
    library.impl("_flash_attn_forward", flash_3, "CPU")
    yield
    registry.set_active_backend(default)
    library._destroy()


def choose(pair: Pair, backend: str) -> None:
    pair.fast.set_attention_backend(backend)
    pair.plain.set_attention_backend("native")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sites_are_those_of_the_usual_backend(backend: str) -> None:
    pair = Pair(Shape(layers=1))
    choose(pair, backend)
    found = find_attention(pair.fast, (), WAN.inputs(pair.shape))
    assert found.names == tuple(pair.rules)
    assert set(found.refused) == {"blocks.0.attn2"}
    assert found.fullgraph
    if backend != "flex":  # a recorder below Python sees the products that it is made of
        recorded = classify_eager(pair.fast, (), WAN.inputs(pair.shape))
        assert [site.name for site in recorded if site.is_site] == list(found.names)


@pytest.mark.parametrize("backend", often(["_native_flash", "flex"], {b: b for b in BACKENDS}))
def test_before_and_after(backend: str) -> None:
    pair = Pair(Shape(layers=1))
    choose(pair, backend)
    pair.apply()
    pair.check()
    choose(pair, "native")
    pair.check()
    choose(pair, backend)
    pair.check()
    assert pair.graphs == 2
