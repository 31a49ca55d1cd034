"""A LLaVA-1.6 computes what the stock model computes from the stock processor's batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration

from lora_llava.core.errors import UserError
from lora_llava.data.collator import PackedCollator, PaddedCollator
from lora_llava.data.images.image_sources import Pixels
from lora_llava.data.packed_rows.shared_prefixes import Prefix
from lora_llava.model.adapters import add_adapters, freeze_plan, lora_config, planned_parameters
from lora_llava.model.families.tower_families import saved_image_processor, tiling_of, tokens_of_image
from lora_llava.model.fast_path.attention import use_flash_varlen
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.fast_path.trained_loss import labelled_loss
from lora_llava.model.loading import load_base
from lora_llava.model.provenance import component_hashes
from lora_llava.model.random_weights import build_random_llava
from lora_llava.model.start import Base, plan_model
from lora_llava.model.vision import accept_features, run_tower, tower_features
from lora_llava.model.vision_adapters import VisionAdapters, used_layers
from lora_llava.model.vision_cache import CachedFeatures, FeatureStore
from lora_llava.recipe.schema import VISION_LINEARS, ModelSection, StartFrom
from tests.model.small_tiled import GRID, SIZES, NamedImages, images, make_tiled, processor_of

ROWS = (("wide.png",), ("high.png", "square.png"), (), ("small.png", "line.png", "wide.png"))


@pytest.fixture(scope="session")
def tiled(base: Callable[[str, str], Base], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-1.6."""
    return make_tiled(base("llama", "clip").folder, tmp_path_factory.mktemp("tiled") / "llava")


def section(folder: Path) -> ModelSection:
    return ModelSection(start_from=StartFrom(llava=str(folder)))


def text_of(names: tuple[str, ...]) -> str:
    return "USER: " + "<image>\n" * len(names) + f"What is shown? {len(names)} ASSISTANT: the colour red."


def stock_batch(folder: Path) -> Any:
    """The stock processor's batch of all rows, padded on the right, labelled behind their first five tokens."""
    processor = processor_of(folder)
    processor.tokenizer.padding_side = "right"
    found = images()
    shown = [[found[name] for name in names] for names in ROWS]
    batch = processor(
        text=[text_of(names) for names in ROWS],
        images=[each for each in shown if each],
        padding=True,
        return_tensors="pt",
    )
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    batch["labels"][:, :5] = -100
    batch["labels"][batch["input_ids"] == processor.image_token_id] = -100
    return batch


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of `stock_batch`, for our collators."""
    batch = stock_batch(folder)
    return [
        {"input_ids": ids[mask == 1].tolist(), "labels": labels[mask == 1].tolist(), "image_files": list(names)}
        for ids, labels, mask, names in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], ROWS, strict=True
        )
    ]


def trained(folder: Path, tower: bool = False, **options: Any) -> Any:
    """Our model with an adapter."""
    return with_adapter(load_base(folder, dtype="float32", **options), tower)


def with_adapter(model: Any, tower: bool = False) -> Any:
    """Add an adapter whose B matrices are not zero, to the tower too if wanted."""
    torch.manual_seed(3)
    vision = VisionAdapters(2, 6.0, VISION_LINEARS, used_layers(model.config)) if tower else None
    peft_model = add_adapters(model, lora_config(r=4, targets=("q_proj", "down_proj"), vision=vision))
    for name, parameter in sorted(peft_model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in found)
    assert any("linear_1" in name for name in found)
    return found


def assert_equal_gradients(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float = 1e-5, atol: float = 5e-8
) -> None:
    """Compare gradients; in float32 the stock model's own differ from exact ones by `atol` beside `rtol`."""
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=rtol, atol=atol, msg=name)


Computed = tuple[torch.Tensor, float, dict[str, torch.Tensor]]
"""Logits, summed loss and gradients."""


@pytest.fixture(scope="session")
def stock(tiled: Path) -> Computed:
    """What the stock model computes from the stock processor's batch, with the same adapter."""
    return compute_stock(tiled, torch.float32)


def compute_stock(folder: Path, dtype: torch.dtype, tower: bool = False) -> Computed:
    base = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = with_adapter(base, tower).to(dtype)
    batch = stock_batch(folder)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    output = model(**{name: value for name, value in batch.items() if name != "labels"})
    logits = output.logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    loss.backward()
    return output.logits.detach()[batch["attention_mask"] == 1], float(loss.detach()), gradients(model)


@pytest.fixture
def all_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave tensors of float64 as they are where norms, rotary positions and the loss compute in float32."""
    to, to_float = torch.Tensor.to, torch.Tensor.float

    def stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = args[0] if args else kwargs.get("dtype")
        stays = tensor.dtype == torch.float64 and wanted is torch.float32
        return tensor if stays else to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda t: to_float(t) if t.dtype == torch.float32 else to(t, torch.float64)
    )


@pytest.mark.usefixtures("all_in_float64")
@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_in_float64_equal_the_stock_model_s(tiled: Path, packed: bool, tower: bool) -> None:
    wanted, model = compute_stock(tiled, torch.float64, tower), trained(tiled, tower).to(torch.float64)
    run_tower(model.get_base_model(), trained=tower)
    loader = Pixels(NamedImages(), processor_of(tiled).image_processor)
    if packed:
        use_flash_varlen(model.get_base_model())
        make_lean(model.get_base_model().model.language_model)
    batch: dict[str, Any] = (PackedCollator(loader) if packed else PaddedCollator(loader, 0))(rows_of(tiled))
    loss, _ = labelled_loss(model, batch | {"pixel_values": batch["pixel_values"].to(torch.float64)})
    loss.backward()
    assert loss.dtype == torch.float64
    assert sum("vision_tower" in name and bool(value.any()) for name, value in wanted[2].items()) == 24 * tower
    assert float(loss.detach()) == pytest.approx(wanted[1], rel=1e-14)
    assert_equal_gradients(gradients(model), wanted[2], rtol=1e-10, atol=1e-14)


def test_padded_rows_equal_the_stock_model(tiled: Path, stock: Computed) -> None:
    model = trained(tiled)
    run_tower(model.get_base_model())
    loader = Pixels(NamedImages(), processor_of(tiled).image_processor)
    batch = PaddedCollator(loader, 0)(rows_of(tiled))
    assert batch["image_sizes"].tolist() == [list(SIZES[name]) for names in ROWS for name in names]
    assert batch["pixel_values"].shape == (24, 3, 32, 32)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    torch.testing.assert_close(logits[batch["attention_mask"] == 1], stock[0], rtol=1e-5, atol=1e-5)
    loss, _ = labelled_loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(stock[1], rel=1e-5)
    assert_equal_gradients(gradients(model), stock[2])


@pytest.mark.parametrize("cached", [False, True])
def test_packed_rows_equal_the_stock_model(tiled: Path, stock: Computed, cached: bool) -> None:
    model = trained(tiled, with_tower=not cached)
    loader: Any = Pixels(NamedImages(), processor_of(tiled).image_processor)
    if cached:
        loader = cached_features(tiled, loader)
    else:
        run_tower(model.get_base_model())
    use_flash_varlen(model.get_base_model())
    batch = PackedCollator(loader)(rows_of(tiled))
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    torch.testing.assert_close(logits[0], stock[0], rtol=1e-5, atol=1e-5)
    loss, _ = labelled_loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(stock[1], rel=1e-5)
    assert_equal_gradients(gradients(model), stock[2])


def cached_features(folder: Path, loader: Pixels) -> CachedFeatures:
    """The features of all images, computed image by image and kept in memory."""
    model, store = load_base(folder, dtype="float32"), FeatureStore(None, {})
    for name in SIZES:
        store.put(name, tower_features(model.model.vision_tower, model.config, loader([name])))
    return CachedFeatures(store, {name: name for name in SIZES}, SIZES)


def test_a_shared_prefix_of_tiles_equals_rows_apart(tiled: Path) -> None:
    loader = Pixels(NamedImages(), processor_of(tiled).image_processor)
    row = rows_of(tiled)[1]
    image_id = processor_of(tiled).image_token_id
    end = max(i for i, token in enumerate(row["input_ids"]) if token == image_id) + 1
    row["labels"][:end] = [-100] * end
    other = row | {"input_ids": [*row["input_ids"][:-2], 5, 6], "labels": [*row["labels"][:-2], 5, 6]}
    shared = [each | {"prefix": Prefix(0, end, 2, 9)} for each in (row, other)]
    results = []
    for rows in ([row, other], shared):
        model = trained(tiled)
        run_tower(model.get_base_model())
        use_flash_varlen(model.get_base_model())
        batch = PackedCollator(loader)(rows)
        loss, _ = labelled_loss(model, batch)
        loss.backward()
        results.append((batch, float(loss.detach()), gradients(model)))
    assert [len(batch["image_sizes"]) for batch, *_ in results] == [4, 2]
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    assert_equal_gradients(results[0][2], results[1][2])


def test_images_are_opened_once_for_pixels_and_sizes(tiled: Path) -> None:
    source = NamedImages()
    loader = Pixels(source, processor_of(tiled).image_processor)
    PackedCollator(loader)(rows_of(tiled))
    assert source.opened == 6
    assert loader.sizes is not None
    fresh = Pixels(NamedImages(), processor_of(tiled).image_processor)
    assert fresh.sizes is not None
    assert fresh.sizes(["line.png"]).tolist() == loader.sizes(["line.png"]).tolist() == [[2, 90]]


def test_the_newline_is_frozen_and_part_of_the_plan(tiled: Path) -> None:
    model = trained(tiled)
    plan = {row.module: (row.trained, row.parameters) for row in freeze_plan(model)}
    assert plan["image newline"] == (False, 32)
    counts = planned_parameters(plan_model(section(tiled)).config, lora_config(r=4, targets=("q_proj", "down_proj")))
    assert counts == {"lora": plan["LoRA adapters"][1], "projector": plan["projector"][1]}


def test_a_model_without_a_tower_takes_the_features_of_tiles(tiled: Path) -> None:
    whole, bare = load_base(tiled, dtype="float32"), load_base(tiled, dtype="float32", with_tower=False)
    assert bare.model.vision_tower is None
    torch.testing.assert_close(bare.model.image_newline, whole.model.image_newline, rtol=0, atol=0)
    random = build_random_llava(
        whole.config, quantization="none", dtype=torch.float32, device=torch.device("cpu"), with_tower=False
    )
    features = torch.randn(4, 16, 16)
    found = random.model.get_image_features(features, image_sizes=torch.tensor([SIZES["wide.png"]]))
    assert [tuple(each.shape) for each in found.pooler_output] == [(tokens_of_image(whole.config, (30, 70)), 32)]
    with pytest.raises(ValueError, match="have 64 patches, and 32 were given"):
        random.model.get_image_features(features[:2], image_sizes=torch.tensor([SIZES["wide.png"]]))
    accept_features(whole)
    assert whole.model.vision_tower is None


def test_the_newline_belongs_to_the_hash_of_the_projector(tiled: Path, tmp_path: Path) -> None:
    shutil.copytree(tiled, tmp_path / "other")
    tensors = load_file(tiled / "model.safetensors")
    name = next(name for name in tensors if name.endswith("image_newline"))
    tensors[name] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    one, other = component_hashes(tiled), component_hashes(tmp_path / "other")
    assert {part for part in one if one[part] != other[part]} == {"projector"}


def test_a_folder_without_newline_is_refused(tiled: Path, tmp_path: Path) -> None:
    shutil.copytree(tiled, tmp_path / "other")
    tensors = load_file(tiled / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("image_newline")}
    save_file(kept, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks image_newline, which"):
        load_base(tmp_path / "other", dtype="float32")
    with pytest.raises(UserError, match=r"^model\.start_from\.llava: .* lacks image_newline, which"):
        plan_model(section(tmp_path / "other"))


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"image_grid_pinpoints": [[32, 64], [50, 64]]}, r"image_grid_pinpoints is \[\[32, 64\], \[50, 64\]\]; each of"),
    ({"image_grid_pinpoints": [336, 672]}, r"image_grid_pinpoints is \[336, 672\]; each of its canvases needs"),
    ({"image_grid_pinpoints": []}, r"image_grid_pinpoints is \[\]; each of its canvases needs"),
    ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full' and its tower a clip"),
    ({"image_grid_pinpoints": [[32, 128]]}, r"has no canvas \(32, 128\) in its image_grid_pinpoints"),
    ({"model_type": "llava_onevision"}, "is a 'llava_onevision' model, not a LLaVA"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_config_that_does_not_fit_is_refused(
    tiled: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(tiled, tmp_path / "other")
    content = json.loads((tiled / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=message):
        saved_image_processor(tmp_path / "other", plan_model(section(tmp_path / "other")).config)


def test_the_tiling_and_the_image_processor_are_those_of_the_folder(tiled: Path) -> None:
    config = plan_model(section(tiled)).config
    tiling = tiling_of(config)
    assert tiling is not None
    assert (tiling.tile, tiling.patches, [list(each) for each in tiling.grid]) == (32, 4, GRID)
    ours, theirs = saved_image_processor(tiled, config), processor_of(tiled).image_processor
    assert ours.to_dict() == theirs.to_dict()
