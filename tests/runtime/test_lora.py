"""LoRA adapters (peft), loaded before or after a plan is applied, switched, fused, unloaded."""

import pytest
import torch
from torch import nn

from tests.runtime.pair import Pair

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_lora(model: nn.Module, name: str = "style", seed: int = 5) -> None:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)


def test_an_adapter_loaded_before_the_plan_is_applied() -> None:
    pair = Pair()
    pair.both(add_lora)
    pair.apply()
    pair.check()
    assert pair.graphs == 1


def test_adapters_loaded_afterwards_take_effect_and_sites_stay_sparse() -> None:
    pair = Pair()
    pair.apply()
    without = pair.check()

    pair.both(add_lora)
    assert not torch.equal(pair.check(), without)
    pair.both(lambda model: model.set_adapters(["style"], [0.5]))
    pair.check()
    pair.both(lambda model: add_lora(model, "subject", seed=6))
    pair.both(lambda model: model.set_adapters(["style", "subject"], [0.7, 0.3]))
    pair.check()
    pair.both(lambda model: model.fuse_lora())
    pair.check()
    pair.both(lambda model: (model.unfuse_lora(), model.unload_lora()))
    torch.testing.assert_close(pair.check(), without)
    assert pair.graphs <= 6  # one per state of the adapters; unloaded is like never loaded


def test_an_adapter_swapped_for_one_of_its_rank_and_scale_compiles_nothing() -> None:
    pair = Pair()
    pair.both(add_lora)
    pair.apply()
    before = pair.check()
    weights = {
        name: torch.randn_like(value)
        for name, value in peft.get_peft_model_state_dict(pair.fast, adapter_name="style").items()
    }
    pair.both(
        lambda model: model.load_lora_adapter(
            dict(weights), prefix=None, adapter_name="style", hotswap=True
        )
    )
    assert not torch.equal(pair.check(), before)
    assert pair.graphs == 1
