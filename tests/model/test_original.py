"""LLaVA's published projector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lora_llava.core.errors import UserError
from lora_llava.model.start import prepare_base
from lora_llava.model.weights.original_projector import read_projector
from lora_llava.recipe import ModelSection, Recipe, StartFrom


def mlp(prefix: str = "model.mm_projector.") -> dict[str, torch.Tensor]:
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    return {prefix + name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def section(stage2: Recipe, file: Path, projector_type: str = "mlp2x_gelu") -> ModelSection:
    update = {"start_from": StartFrom(projector=str(file)), "projector_type": projector_type}
    return stage2.model.model_copy(update=update)


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", ""])
def test_mlp_lands_in_the_base_bit_by_bit(stage2: Recipe, tmp_path: Path, prefix: str) -> None:
    published = mlp(prefix)
    torch.save(published, tmp_path / "mm_projector.bin")
    base = prepare_base(section(stage2, tmp_path / "mm_projector.bin"), 0)
    projector = LlavaForConditionalGeneration.from_pretrained(base.name).model.multi_modal_projector
    assert torch.equal(projector.linear_1.weight, published[f"{prefix}0.weight"])
    assert torch.equal(projector.linear_1.bias, published[f"{prefix}0.bias"])
    assert torch.equal(projector.linear_2.weight, published[f"{prefix}2.weight"])
    assert torch.equal(projector.linear_2.bias, published[f"{prefix}2.bias"])
    assert base.parts is not None
    assert base.parts.projector is not None


def test_linear_projector_gets_the_identity(tmp_path: Path) -> None:
    torch.save(
        {"model.mm_projector.weight": torch.ones(4, 2), "model.mm_projector.bias": torch.zeros(4)}, tmp_path / "p.bin"
    )
    tensors, _ = read_projector(tmp_path / "p.bin", "linear")
    assert torch.equal(tensors["linear_2.weight"], torch.eye(4))
    assert torch.equal(tensors["linear_2.bias"], torch.zeros(4))
    assert torch.equal(tensors["linear_1.weight"], torch.ones(4, 2))


def test_wrong_type_names_the_right_one(tmp_path: Path) -> None:
    torch.save(mlp(), tmp_path / "p.bin")
    with pytest.raises(UserError, match=r"looks like mlp2x_gelu: set model\.projector_type"):
        read_projector(tmp_path / "p.bin", "linear")


def test_an_incomplete_projector_is_refused(tmp_path: Path) -> None:
    torch.save({name: t for name, t in mlp().items() if "bias" not in name}, tmp_path / "p.bin")
    with pytest.raises(UserError, match=r"no linear_1.bias; it is not a complete mlp2x_gelu projector"):
        read_projector(tmp_path / "p.bin", "mlp2x_gelu")


def test_shape_of_another_tower_is_named(stage2: Recipe, tmp_path: Path) -> None:
    published = mlp()
    published["model.mm_projector.0.weight"] = torch.randn(64, 48)
    torch.save(published, tmp_path / "p.bin")
    with pytest.raises(UserError, match=r"linear_1.weight has shape \(64, 48\), this LLM and tower need \(64, 32\)"):
        prepare_base(section(stage2, tmp_path / "p.bin"), 0)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"0.weight": Path("code")}, tmp_path / "p.bin")
    with pytest.raises(UserError, match="not a file of tensors"):
        read_projector(tmp_path / "p.bin", "mlp2x_gelu")


def test_missing_file_is_named(stage2: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.start_from.projector: .*p.bin is missing"):
        prepare_base(section(stage2, tmp_path / "p.bin"), 0)
