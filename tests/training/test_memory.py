"""The planner's computed memory against measurements, and its choices against all others."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, LlamaModel, LlavaConfig

from lora_llava.benchmark.benchmark_rows import shape_config
from lora_llava.model.adapters import add_adapters, lora_config, planned_parameters
from lora_llava.model.families.decoder_shape import tower_parameters
from lora_llava.model.fast_path.activation_checkpointing import checkpoint_language_model
from lora_llava.model.fast_path.attention import IMPLEMENTATION, register_flash_varlen
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.random_weights import build_random_llava
from lora_llava.planning import memory
from lora_llava.planning.memory import (
    CUDA_CONTEXT,
    GIB,
    Step,
    candidates,
    fit_step,
    host_candidates,
    needed,
    projector_parameters,
    smallest,
)
from lora_llava.recipe.schema import LINEARS, LoraSection
from tests.memory import saved_bytes, small_config

SMALL = small_config()


@pytest.fixture(autouse=True)
def expandable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan with the allocator's setting that every verb makes."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def step_of(shape: str = "7b", **values: Any) -> Step:
    config = SMALL if shape == "small" else shape_config(shape, 0, 32000)
    defaults: dict[str, Any] = {
        "config": config,
        "quantization": "nf4",
        "dtype_bytes": 2,
        "lora": LoraSection(r=16),
        "optimizer_bytes": 8,
        "tokens": 3072,
        "trained_tokens": 1000,
        "images": 4,
        "cached_features": True,
        "cuda": True,
    }
    return Step(**defaults | values)


@pytest.mark.parametrize(("shape", "lora", "projector"), [("7b", 159907840, 20979712), ("13b", 250347520, 31467520)])
def test_trained_parameters_are_counted_exactly(shape: str, lora: int, projector: int) -> None:
    step = step_of(shape, lora=LoraSection(r=64))
    assert step.lora_parameters == lora
    assert projector_parameters(step.config) == projector


@pytest.mark.parametrize("options", [{}, {"targets": ("q_proj", "down_proj")}, {"dora": True}])
def test_adapters_are_counted_as_peft_makes_them(options: dict[str, Any]) -> None:
    section = LoraSection(r=4, **options)
    step = step_of("small", lora=section)
    made = planned_parameters(
        SMALL, lora_config(**section.model_dump(exclude={"init", "targets"}), targets=step.targets)
    )
    assert step.lora_parameters == made["lora"]
    assert projector_parameters(SMALL) == made["projector"]


@pytest.mark.parametrize("config", [SMALL, shape_config("7b", 0, 32000)])
def test_the_tower_is_counted_as_transformers_makes_it(config: LlavaConfig) -> None:
    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config)
    assert tower_parameters(config.vision_config) == sum(p.numel() for p in tower.parameters())


def test_bytes_of_weights_are_exact() -> None:
    model = build_random_llava(SMALL, quantization="nf4", dtype=torch.bfloat16, device=torch.device("cpu"))
    parts = step_of("small", cached_features=False).parts()
    four_bit, unquantized = 0, 0
    for name, parameter in model.model.language_model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            unquantized += parameter.nbytes
        else:
            four_bit += parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
            assert name.endswith("proj.weight")
    unquantized += model.lm_head.weight.nbytes
    tower = sum(p.nbytes for p in model.model.vision_tower.parameters())
    assert parts["embeddings, head, norms"] == unquantized
    assert parts["vision tower"] == tower
    assert parts["language model, NF4"] == pytest.approx(four_bit, rel=0.01)  # blocks that are not full


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_counted_once(tied: bool) -> None:
    config = copy.deepcopy(SMALL)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = build_random_llava(config, quantization="none", dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    others = {n: p for n, p in model.named_parameters() if n not in linears or n == "lm_head.weight"}
    unquantized = sum(p.nbytes for n, p in others.items() if "language_model" in n or n == "lm_head.weight")
    assert step_of("small", config=config, quantization="none").parts()["embeddings, head, norms"] == unquantized


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_sharded_ranks_have_their_share_and_the_gathered_weights(quantization: str) -> None:
    alone, shared = (step_of(quantization=quantization, ranks=ranks).parts() for ranks in (1, 4))
    model = next(name for name in alone if name.startswith("language model"))
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    scales = layers / 64 + layers * 4 / (64 * 256) if quantization == "nf4" else 0
    assert shared[model] == pytest.approx((alone[model] - scales) / 4 + scales, abs=4)
    for part in ("embeddings, head, norms", "LoRA", "gradients", "optimizer"):
        assert shared[part] == alone[part] // 4
    layer = alone[model] // 32 + alone["LoRA"] // 32
    assert shared["gathered weights"] == pytest.approx(2 * layer + 2 * 32064 * 4096, abs=4)
    same = [part for part in alone if "activations" in part or "working" in part or part == "projector"]
    assert [shared[part] for part in same] == [alone[part] for part in same]
    assert "gathered weights" not in alone


@pytest.mark.parametrize(("cuda", "dropout"), [(True, 0.0), (False, 0.0), (False, 0.05)])
def test_a_layer_keeps_the_computed_bytes(cuda: bool, dropout: float) -> None:
    """Saved bytes by token and layer; SDPA keeps what FlashAttention keeps, the CPU's loop a copy more."""
    torch.manual_seed(0)
    model = LlamaModel(SMALL.text_config).to(torch.bfloat16)
    if not cuda:
        register_flash_varlen()
        model.set_attn_implementation(IMPLEMENTATION)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_dropout=dropout, target_modules=list(LINEARS))).train()
    make_lean(adapted)
    layers = model.layers

    def kept(tokens: int, depth: int) -> int:
        model.layers = layers[:depth]
        embeds = torch.randn(1, tokens, 128, dtype=torch.bfloat16, requires_grad=True)
        ends = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
        bounds = {} if cuda else {"cu_seq_lens_q": ends, "attention_mask": torch.zeros(1, 1, 1, 1)}
        with torch.autocast("cpu", torch.bfloat16):
            return saved_bytes(adapted, lambda: adapted(inputs_embeds=embeds, use_cache=False, **bounds))

    two, one = (kept(96, depth) - kept(32, depth) for depth in (3, 2))
    lora = LoraSection(r=16, dropout=dropout)
    assert (two - one) / 64 == step_of("small", tokens=1, lora=lora, cuda=cuda).layer_bytes()


def test_the_fastest_way_that_fits_is_chosen() -> None:
    step = step_of()
    ways = candidates(step)
    assert [way.checkpointed for way in ways] == [*range(32), 31]
    assert [way.offloaded for way in ways] == [False] * 32 + [True]
    in_host = host_candidates(step)
    assert [(way.checkpointed, way.offloaded, way.host_layers) for way in in_host] == [
        (31, True, count) for count in range(3, 32)
    ]
    ways += in_host
    assert all(later.peak <= earlier.peak for earlier, later in itertools.pairwise(ways))
    for place, way in enumerate(ways):
        budget = math.ceil(needed(way)) + 1
        assert fit_step(step, budget) == next(first for first in ways if needed(first) <= needed(way))
        under = fit_step(step, needed(way) - 1)
        assert under is None or ways.index(under) > place
    assert fit_step(step, smallest(step)) is not None
    assert fit_step(step, smallest(step) - 1) is None


@pytest.mark.parametrize(("shape", "gib", "layers"), [("7b", 4.8, 8), ("13b", 7.6, 12)])
def test_what_does_not_fit_otherwise_has_weights_in_host_memory(shape: str, gib: float, layers: int) -> None:
    """r 16, cached features, one row of 1,024 tokens, 8-bit states: the figures of the documents."""
    step = step_of(shape, tokens=1024, trained_tokens=358, images=1, optimizer_bytes=2)
    found = fit_step(step, int(gib * GIB))
    assert found is not None
    assert found.host_layers == layers
    assert fit_step(step, int(gib * GIB), in_host=False) is None
    assert found.host_savings == (layers - 2) * int(step.shape.weights * (0.5 + 1 / 64)) // step.layers
    assert found.copies == 2 * (layers - 2)
    assert found.peak == candidates(step)[-1].peak - found.host_savings
    assert found.loading / 0.98 <= gib * GIB  # all weights are loaded before some are moved


def test_weights_stay_on_the_gpu_where_they_cannot_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    for change in (
        {"cuda": False},
        {"quantization": "none"},
        {"lora": LoraSection(r=16, dora=True)},
        {"lora": LoraSection(r=16, init="loftq")},
    ):
        assert host_candidates(step_of(**change)) == [], change
    assert host_candidates(step_of())
    monkeypatch.setattr(memory, "this_rank", lambda: (0, 2))
    assert host_candidates(step_of()) == []


def test_keeping_the_last_layer_costs_nothing() -> None:
    assert replace(step_of(), checkpointed=31).peak < replace(step_of(), checkpointed=32).peak


@pytest.mark.parametrize(("shape", "cap"), [("7b", 7.2), ("13b", 11.2)])
def test_four_samples_of_768_tokens_are_planned_into_small_cards(shape: str, cap: float) -> None:
    """Computed values, to be confirmed on a GPU (`scripts/benchmark.py gpu`)."""
    found = fit_step(step_of(shape), int(cap * GIB) + CUDA_CONTEXT)
    assert found is not None
    assert found.peak - CUDA_CONTEXT < cap * GIB


def test_more_of_anything_needs_more_memory() -> None:
    peak = step_of().peak
    for change in (
        {"tokens": 4096},
        {"lora": LoraSection(r=64)},
        {"quantization": "none"},
        {"cached_features": False},
        {"lora": LoraSection(r=16, dropout=0.1)},
        {"dtype_bytes": 4},
    ):
        assert step_of(**change).peak > peak, change
    assert step_of(optimizer_bytes=2).peak < peak
    assert step_of(lora=None).peak < peak


@pytest.mark.parametrize(("layers", "offload"), [(0, False), (1, False), (3, False), (None, False), (2, True)])
def test_recomputed_and_offloaded_layers_give_the_same_gradients(layers: int | None, offload: bool) -> None:
    """Gradients are bit-equal whatever is kept, and no more is kept than planned."""

    def run(layers: int | None, offload: bool) -> tuple[dict[str, torch.Tensor], int, list[bool]]:
        torch.manual_seed(0)
        model = build_random_llava(SMALL, quantization="none", dtype=torch.float32, device=torch.device("cpu"))
        adapted = add_adapters(model, lora_config(r=4, alpha=8, targets=LINEARS)).train()
        make_lean(model.model.language_model)
        checkpoint_language_model(model, layers, offload)
        ids = torch.tensor([[1, 499, 499, 499, 499, 5, 6, 7, 8, 9]])
        pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        outputs: list[torch.Tensor] = []
        kept = saved_bytes(
            adapted, lambda: outputs.append(adapted(input_ids=ids, pixel_values=pixels, use_cache=False).logits)
        )
        outputs[0].square().mean().backward()
        flags = [bool(layer.gradient_checkpointing) for layer in model.model.language_model.layers]
        return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}, kept, flags

    expected, everything, _ = run(0, False)
    found, kept, flags = run(layers, offload)
    count = 3 if layers is None else layers
    assert flags == [index < count for index in range(3)]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert (kept < everything) == (count > 0)


def test_a_random_nf4_model_is_adapted_as_a_quantised_one() -> None:
    """peft and trl recognize it by a flag that transformers sets on loading."""
    model = build_random_llava(SMALL, quantization="nf4", dtype=torch.float32, device=torch.device("cpu"))
    adapted = add_adapters(model, lora_config(r=4, targets=LINEARS))
    layer = adapted.get_base_model().model.language_model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    assert make_lean(adapted) == 3 * (7 + 3) + 1


def test_a_gpu_without_a_kernel_keeps_what_a_cpu_keeps_and_repeats_grouped_heads() -> None:
    step = step_of("small", tokens=1, cuda=True, dtype_bytes=2)
    by_sample = replace(step, by_sample=True)
    assert by_sample.layer_bytes() - step.layer_bytes() == 2 * 128  # the samples' outputs, concatenated
    grouped = LlavaConfig(
        text_config=SMALL.text_config.to_dict() | {"num_key_value_heads": 1}, vision_config=SMALL.vision_config
    )
    step, by_sample = replace(step, config=grouped), replace(by_sample, config=grouped)
    assert by_sample.layer_bytes() - step.layer_bytes() == 2 * 128 + 2 * 2 * (128 - 32)
