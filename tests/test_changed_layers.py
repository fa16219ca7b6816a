"""A plan for fine-tuned weights: what they are stored in does not matter, what they are does."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from evdit_opt.changed_layers import changed_layers, require_changed, share_of_change
from evdit_opt.demo.tinywan import load_tinywan
from evdit_opt.errors import PlanMismatchError
from evdit_opt.plan_records import FinetuneRecord


@pytest.fixture(scope="module")
def tinywan() -> nn.Module:
    return load_tinywan().transformer


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [one for one in caplog.records if one.name.startswith("evdit_opt")]
    return [one.getMessage() for one in ours]


MODULES = ("to_q", "to_k", "to_v")


def adapted(model: nn.Module, name: str, seed: int, size: float) -> nn.Module:
    """With an adapter whose layers' weights change by about ``size``, relative."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(MODULES))
    torch.manual_seed(seed)
    model.add_adapter(config, adapter_name=name)
    for module in model.modules():
        if name in getattr(module, "lora_B", {}):
            down, weight = module.lora_A[name].weight, module.get_base_layer().weight
            up = module.lora_B[name].weight.data.normal_()
            up *= size * weight.norm() / (up @ down).norm()
    return model


def record_of(before: nn.Module, after: nn.Module) -> FinetuneRecord:
    return FinetuneRecord(
        steps=2, full_steps=6, time_shift=1.0, lora_rank=0, lora_modules=(), weights_sha256="0",
        changed=changed_layers(before, after),
    )  # fmt: skip


def quantized(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def fused(model: nn.Module) -> nn.Module:
    model.fuse_lora()
    model.unload_lora()
    return model


STORED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "loaded": lambda model: model,
    "fused": fused,
    "bfloat16": lambda model: model.bfloat16(),
    "fused float16": lambda model: fused(model).half(),
    "fused int8": lambda model: quantized(fused(model)),
    "fused float8": lambda model: fused(model).to(torch.float8_e4m3fn),
    "another adapter": lambda model: (
        adapted(model, "style", 2, 0.05),
        model.set_adapters(["default", "style"]),
    )[0],
}


@pytest.mark.parametrize("stored", STORED)
def test_weights_are_known_however_they_are_stored(
    stored: str, tinywan: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    base = copy.deepcopy(tinywan)
    trained = adapted(copy.deepcopy(base), "default", 1, 0.05)
    record = record_of(base, trained)
    require_changed(STORED[stored](trained), record)
    assert told(caplog) == []
    others = base if stored == "loaded" else STORED[stored](adapted(base, "default", 3, 0.05))
    with pytest.raises(PlanMismatchError, match=r"training changed in blocks.*restore_finetuned"):
        require_changed(others, record)


def test_what_cannot_be_told_is_a_warning(
    tinywan: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    base = tinywan
    trained = adapted(copy.deepcopy(base), "default", 1, 0.05)
    record = record_of(base, trained)
    assert changed_layers(base, copy.deepcopy(base)) == ()
    require_changed(base, record_of(base, base))
    assert told(caplog) == []
    trained.set_adapters(["default"], [0.4])
    require_changed(trained, record)
    require_changed(trained.to("meta"), record)
    assert ["40%" in message for message in told(caplog)] == [True, False]
    assert share_of_change(trained, record.changed) is None
