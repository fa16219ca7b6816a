"""ONNX: onnxruntime computes what PyTorch computes, from operators of the standard alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.export import export_onnx, export_program, to_onnx
from evdit_opt.export.to_onnx import write_onnx
from evdit_opt.masks import Rule
from evdit_opt.second_rule import SecondRule
from tests.export.planned import Planned, planned, planned_toy
from tests.often import often

onnx = pytest.importorskip("onnx", reason="needs the extra export")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")

CLOSE = 1e-4
"""Largest relative error of float32, in the norm of the output. What is found is near 3e-7."""
RULES = (Rule(2, weighting="balanced"), Rule(0, window=1), Rule(1, spacing="centred"), Rule(1))


def run(path: Path, given: Planned) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {entry.name: given.call[entry.name].numpy() for entry in session.get_inputs()}
    out: np.ndarray = session.run(None, feeds)[0]
    return torch.from_numpy(out)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def weighted(given: Planned) -> Planned:
    """Another rule at every site, the first of them with weights."""
    rules = [RULES[n % len(RULES)] for n in range(len(given.plan.sites))]
    sites = [replace(site, rule=rule) for site, rule in zip(given.plan.sites, rules, strict=True)]
    return replace(given, plan=replace(given.plan, sites=tuple(sites)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layers"),
    often(
        ["cogvideox"], {"wan": ("wan", 2), "cogvideox": ("cogvideox", 2), "hunyuan": ("hunyuan", 1)}
    ),
)
def test_onnxruntime_computes_the_same(kind: str, layers: int, tmp_path: Path) -> None:
    given = weighted(planned(kind, layers))
    assert len({site.rule for site in given.plan.sites}) == len(given.plan.sites) >= 2
    expected = given.optimized()
    path = export_onnx(given.model, given.call, tmp_path / "model.onnx", given.plan)

    assert relative(run(path, given), expected) < CLOSE
    assert relative(given.dense(), expected) > 10 * CLOSE, "the bound proves little"

    written = onnx.load(path)
    onnx.checker.check_model(written)
    assert [entry.domain for entry in written.opset_import] == [""]
    assert {node.domain for node in written.graph.node} == {""}
    assert not written.functions


def test_operator_set_23_has_an_attention_of_its_own(tmp_path: Path) -> None:
    given = weighted(planned_toy())  # weights are a mask with one row
    path = export_onnx(given.model, given.call, tmp_path / "toy.onnx", given.plan, opset=23)
    assert "Attention" in {node.op_type for node in onnx.load(path).graph.node}
    assert __file__.encode() not in path.read_bytes(), "the file tells where it was made"
    assert b"toy_dit.py" not in path.read_bytes()
    assert relative(run(path, given), given.optimized()) < CLOSE


def test_two_rules_at_a_site(tmp_path: Path) -> None:
    given = planned_toy()
    static = given.optimized()
    second = SecondRule(rule=Rule(1, weighting="balanced"), heads=(1,), total=2)
    sites = tuple(replace(site, second=second) for site in given.plan.sites)
    given = replace(given, plan=replace(given.plan, sites=sites))
    path = export_onnx(given.model, given.call, tmp_path / "toy.onnx", given.plan)
    assert relative(run(path, given), given.optimized()) < CLOSE
    assert relative(static, given.optimized()) > 10 * CLOSE


def test_weights_may_lie_beside_the_model(tmp_path: Path) -> None:
    given = planned_toy()
    program = export_program(given.model, given.call, given.plan, standard_ops=True)
    path = write_onnx(program, tmp_path / "toy.onnx", external_data=True)
    written = onnx.load(path, load_external_data=False)
    beside = [w for w in written.graph.initializer if w.data_location == onnx.TensorProto.EXTERNAL]
    assert sum(len(w.raw_data) for w in beside) == 0 < len(beside)
    assert (tmp_path / "toy.onnx.data").stat().st_size > 0
    assert relative(run(path, given), given.optimized()) < CLOSE


class WithMasks(torch.nn.Module):
    """Fills boolean masks, as models do with their padding."""

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        every = torch.ones_like(hidden)
        kept = every.masked_fill(hidden, False) | (~every).masked_fill(hidden.roll(1), True)
        kept = torch.where(hidden.roll(2), kept, hidden)
        return x.masked_fill(~kept, 0.5) + torch.where(kept, x, -x)


def test_boolean_masks_are_filled_without_where(tmp_path: Path) -> None:
    model = WithMasks()
    call = {"x": torch.randn(7), "hidden": torch.tensor([0, 0, 1, 1, 0, 1, 0], dtype=torch.bool)}
    path = write_onnx(torch.export.export(model, (), call), tmp_path / "masks.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {name: value.numpy() for name, value in call.items()})
    assert torch.equal(torch.from_numpy(out), model(**call))


def test_the_operator_cannot_be_written(tmp_path: Path) -> None:
    given = planned_toy()
    program = export_program(given.model, given.call, given.plan)
    with pytest.raises(UnsupportedInputError, match=r"evdit\.tile_attention"):
        write_onnx(program, tmp_path / "toy.onnx")
    assert not (tmp_path / "toy.onnx").exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(to_onnx, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UnsupportedInputError, match=r"onnxscript cannot.*evdit-opt\[export\]"):
        export_onnx(torch.nn.Linear(1, 1), {}, tmp_path / "x.onnx")
