"""GGUF: tensors equal the weights, the vocabulary the tokenizer, and what llama.cpp computes otherwise is refused."""

from __future__ import annotations

import heapq
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config
from transformers.utils.chat_template_utils import render_jinja_template

from lora_llava.commands.main import main
from lora_llava.data.templates.named_templates import TEMPLATES, chat_template
from lora_llava.demo.build import build_tokenizer
from lora_llava.publishing.gguf.gguf_types import tensor_type
from lora_llava.publishing.gguf.gguf_vocabulary import _scores_of_merges
from lora_llava.publishing.gguf.text_model import interleave_halves
from tests.tiny_tower import tiny_tower

Types = gguf.GGMLQuantizationType
Make = Train = Callable[..., Path]
MARKER = "<__media_Ab3dE__>"


@pytest.fixture
def model(tmp_path: Path) -> Make:
    """Return a function that writes a small merged folder: grouped keys, three tower layers, features of the second."""

    def make(text: Any = None, **changes: Any) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / "merged"
        tokenizer = build_tokenizer(0)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(folder)
        shape = {"vocab_size": 960, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2, "bos_token_id": 1}
        vision = tiny_tower()
        config = LlavaConfig(
            text_config=(text or LlamaConfig)(**shape, **heads), vision_config=vision, image_token_index=896, **changes
        )
        LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(chat_template(TEMPLATES["vicuna_v1"]), encoding="utf-8")
        pixels = {"do_pad": True, "resample": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
        content = {"image_processor": pixels | {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True}}
        (folder / "processor_config.json").write_text(json.dumps(content))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 897], "bos_token_id": 1}))
        return folder

    return make


def export(folder: Path, *flags: str) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
    """Export, and return tensors and readers of both files."""
    output = folder.with_name("gguf")
    assert main("export", [str(folder), "--format", "gguf", "--output", str(output), *flags]) == 0
    quant = flags[flags.index("--quant") + 1] if "--quant" in flags else "f16"
    readers = [gguf.GGUFReader(output / name) for name in (f"model-{quant}.gguf", "mmproj-f16.gguf")]
    return *({t.name: t for t in reader.tensors} for reader in readers), *readers


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict())


def field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def test_the_language_models_tensors_are_the_weights_with_heads_interleaved(model: Make) -> None:
    folder = model()
    text, _, reader, _ = export(folder)
    source = weights(folder)
    assert len(text) == 3 + 2 * 9
    for name, heads in (("q", 4), ("k", 2)):
        stored, wanted = (
            values(text[f"blk.1.attn_{name}.weight"]),
            source[f"model.language_model.layers.1.self_attn.{name}_proj.weight"],
        )
        rows = stored.reshape(heads, 8, 2, 64)  # undone by hand: even rows are the first half, odd rows the second
        assert torch.equal(torch.cat([rows[:, :, 0], rows[:, :, 1]], 1).reshape(wanted.shape), wanted.half().float())
        assert not torch.equal(stored, wanted.half().float())
    for new, old in {
        "token_embd.weight": "model.language_model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.0.attn_v.weight": "model.language_model.layers.0.self_attn.v_proj.weight",
        "blk.1.attn_output.weight": "model.language_model.layers.1.self_attn.o_proj.weight",
        "blk.1.ffn_down.weight": "model.language_model.layers.1.mlp.down_proj.weight",
    }.items():
        assert text[new].tensor_type == Types.F16
        assert torch.equal(values(text[new]), source[old].half().float()), new
    assert text["output_norm.weight"].tensor_type == Types.F32
    expected = {"llama.block_count": 2, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16}
    expected |= {"general.architecture": "llama", "llama.vocab_size": 960, "general.file_type": 1}
    assert {name: field(reader, name) for name in expected} == expected


def test_qwen2_keeps_the_order_of_rows_and_its_biases(model: Make) -> None:
    folder = model(Qwen2Config)
    text, _, reader, _ = export(folder)
    source = weights(folder)
    prefix = "model.language_model.layers.0.self_attn.q_proj"
    assert field(reader, "general.architecture") == "qwen2"
    assert torch.equal(values(text["blk.0.attn_q.weight"]), source[f"{prefix}.weight"].half().float())
    assert torch.equal(values(text["blk.0.attn_q.bias"]), source[f"{prefix}.bias"])


def test_a_bias_is_interleaved_like_its_rows() -> None:
    assert interleave_halves(torch.arange(8.0), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_tower_ends_at_its_feature_layer_and_has_no_class_token(model: Make) -> None:
    folder = model()
    _, tower, _, reader = export(folder)
    source = weights(folder)
    assert field(reader, "clip.vision.feature_layer") == [2]
    assert field(reader, "clip.vision.block_count") == 3  # versions without that key leave out the last one
    assert field(reader, "clip.use_gelu") is False
    assert "v.class_embd" not in tower
    assert not [name for name in tower if "post" in name]
    position = source["model.vision_tower.embeddings.position_embedding.weight"]
    assert torch.equal(values(tower["v.position_embd.weight"]), position[1:])
    fc1 = source["model.vision_tower.encoder.layers.1.mlp.fc1.weight"]
    assert torch.equal(values(tower["v.blk.1.ffn_up.weight"]), fc1.half().float())
    second = source["model.multi_modal_projector.linear_2.weight"]
    assert torch.equal(values(tower["mm.2.weight"]), second.half().float())


def test_the_class_token_first_or_last(model: Make) -> None:
    folder = model()
    position = weights(folder)["model.vision_tower.embeddings.position_embedding.weight"]
    _, tower, _, _ = export(folder, "--class-token", "first")
    assert torch.equal(values(tower["v.position_embd.weight"]), position)
    assert "v.class_embd" in tower
    folder = folder.rename(folder.with_name("again"))
    folder.with_name("gguf").rename(folder.with_name("done"))
    _, tower, _, _ = export(folder, "--class-token", "last")
    assert torch.equal(values(tower["v.position_embd.weight"]), torch.cat([position[1:], position[:1]]))


def test_a_linear_projector_is_an_mlp_of_the_same_function(model: Make) -> None:
    folder = model(projector_hidden_act="linear")
    _, tower, _, _ = export(folder)
    source = weights(folder)
    parts = [source[f"model.multi_modal_projector.linear_{i}.{end}"] for i in (1, 2) for end in ("weight", "bias")]
    x = torch.randn(5, 32)
    wanted = (x @ parts[0].T + parts[1]) @ parts[2].T + parts[3]
    hidden = torch.nn.functional.gelu(
        x @ values(tower["mm.0.weight"]).T + values(tower["mm.0.bias"]), approximate="tanh"
    )
    found = hidden @ values(tower["mm.2.weight"]).T + values(tower["mm.2.bias"])
    assert torch.allclose(found, wanted, atol=1e-4)


def test_equal_sizes_in_the_tower_are_written_with_the_names_that_llama_swaps(model: Make) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16
    )
    folder = model()
    config = LlavaConfig.from_pretrained(folder)
    config.vision_config = vision
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    _, tower, _, _ = export(folder)
    fc1 = weights(folder)["model.vision_tower.encoder.layers.0.mlp.fc1.weight"]
    assert torch.equal(values(tower["v.blk.0.ffn_down.weight"]), fc1.half().float())


def test_the_vocabulary_is_the_tokenizers(model: Make) -> None:
    _, _, reader, _ = export(model())
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert (len(tokens), tokens[2], tokens[896], tokens[959]) == (960, "</s>", "<image>", "[PAD959]")
    assert (kinds[0], kinds[2], kinds[3], kinds[300], kinds[896], kinds[959]) == (2, 3, 6, 1, 3, 5)
    ids = {"bos": 1, "eos": 2, "eot": 897}
    assert {name: field(reader, f"tokenizer.ggml.{name}_token_id") for name in ids} == ids
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    assert field(reader, "tokenizer.ggml.add_space_prefix") is False  # the template writes the first space
    assert field(reader, "tokenizer.ggml.model") == "gemma4"  # the demo's merges do not come from SentencePiece


@pytest.mark.parametrize("as_parts", [False, True], ids=["marker in the text", "parts"])
def test_the_template_writes_what_was_trained_around_llamas_marker(model: Make, as_parts: bool) -> None:
    folder = model()
    _, _, reader, _ = export(folder)
    image, question = {"type": "image"}, {"type": "text", "text": "Which?"}
    trained = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [image, question]}]
    trained += [{"role": "assistant", "content": "That."}, {"role": "user", "content": "Why?"}]
    sent: Any = [{"type": "media_marker", "text": MARKER}, question] if as_parts else f"{MARKER}Which?"
    served = [trained[0], {"role": "user", "content": sent}, *trained[2:]]
    exported = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    wanted = render_jinja_template([trained], chat_template=exported, add_generation_prompt=True)[0][0]
    template = field(reader, "tokenizer.chat_template")
    found = render_jinja_template([served], chat_template=template, add_generation_prompt=True)[0][0]
    assert "<image> \nWhich?" in wanted
    assert found == " " + wanted.replace("<image>", MARKER)


def by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """Split a text as llama.cpp's `llm_tokenizer_spm_session`: the neighbours of the best score first."""
    pieces = list(text)
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not pairs:
            return pieces
        _, place = heapq.nsmallest(1, pairs)[0]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def test_scores_merge_like_a_complete_list_of_merges() -> None:
    words = ["ab", "bc", "abc", "ca", "abca", "cab"]
    singles = list("abc")
    vocabulary = {token: i for i, token in enumerate([*singles, *words])}
    merges = [
        (w[:cut], w[cut:]) for w in words for cut in range(1, len(w)) if w[:cut] in vocabulary and w[cut:] in vocabulary
    ]
    scores = _scores_of_merges(merges, vocabulary, list(vocabulary))
    assert scores is not None
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    table = dict(zip(vocabulary, scores, strict=True))
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(singles, size)) for size in range(1, 60)]
    assert [by_scores(text, table) for text in texts] == [tokenizer.encode(text).tokens for text in texts]
    assert _scores_of_merges(merges[:-1], vocabulary, list(vocabulary)) is None  # a split is missing
    assert _scores_of_merges([*merges[1:], merges[2]], vocabulary, list(vocabulary)) is None


def test_a_byte_level_tokenizer_is_named_by_its_pre_tokenizer(model: Make) -> None:
    folder = model()
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["byte_fallback"] = False
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, level]}
    file.write_text(json.dumps(content), encoding="utf-8")
    _, _, reader, _ = export(folder)
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == "smollm"
    assert field(reader, "tokenizer.ggml.merges")[0] == " ".join(content["model"]["merges"][0])


def test_q8_0_is_within_half_a_step(model: Make) -> None:
    folder = model()
    text, tower, _, _ = export(folder, "--quant", "q8_0")
    wanted = weights(folder)["lm_head.weight"]
    step = wanted.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
    assert text["output.weight"].tensor_type == Types.Q8_0
    error = (values(text["output.weight"]) - wanted).reshape(-1, 32).abs()
    assert bool((error <= step * 0.57).all())
    assert tower["mm.0.weight"].tensor_type == Types.F16


@pytest.mark.parametrize(
    ("name", "columns", "kind"),
    [
        ("output.weight", 4096, "Q6_K"),
        ("token_embd.weight", 4096, "Q4_K"),
        ("blk.0.attn_v.weight", 4096, "Q6_K"),
        ("blk.4.attn_v.weight", 4096, "Q4_K"),
        ("blk.6.ffn_down.weight", 11008, "Q6_K"),
        ("blk.31.ffn_down.weight", 11008, "Q6_K"),
        ("blk.31.attn_q.weight", 4096, "Q4_K"),
        ("blk.6.ffn_down.weight", 96, "Q8_0"),
        ("blk.0.attn_q.weight", 96, "Q5_0"),
        ("output.weight", 96, "Q8_0"),
        ("blk.0.attn_q.weight", 40, "F16"),
    ],
)
def test_types_in_q4_k_m(name: str, columns: int, kind: str) -> None:
    assert tensor_type(name, (64, columns), "q4_k_m", 32, tied=False).name == kind


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "family": ("config.json", lambda c: c["text_config"].update(model_type="gemma"), "knows llama, mistral, qwen2"),
    "new family": ("config.json", lambda c: c["text_config"].update(model_type="zebra"), "zebra"),
    "no weights": (
        "config.json",
        lambda c: c["text_config"].update(num_hidden_layers=3),
        "lacks model.language_model.layers.2.self_attn.q_proj.weight",
    ),
    "yarn": (
        "config.json",
        lambda c: c["text_config"].update(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        "knows default, linear and llama3",
    ),
    "layers": ("config.json", lambda c: c.update(vision_feature_layer=[-2, -3]), "features of one layer"),
    "full": ("config.json", lambda c: c.update(vision_feature_select_strategy="full"), "class token"),
    "act": ("config.json", lambda c: c.update(projector_hidden_act="relu"), "projector has gelu"),
    "no llava": ("config.json", lambda c: c.update(model_type="llama"), "is a 'llama' model"),
    "crop": ("processor_config.json", lambda c: c["image_processor"].update(do_pad=False), "--square-images"),
    "bilinear": ("processor_config.json", lambda c: c["image_processor"].update(resample=2), "bicubically"),
    "unigram": ("tokenizer.json", lambda c: c["model"].update(type="Unigram"), "knows BPE"),
    "split": ("tokenizer.json", lambda c: c["model"].update(byte_fallback=False), "pre-tokenizer"),
    "rows": ("tokenizer.json", lambda c: c["added_tokens"][-1].update(id=5000), "960 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_computes_otherwise_is_refused_in_one_line(
    case: str, model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model()
    name, change, words = REFUSED[case]
    edit(folder, name, change)
    output = folder.with_name("gguf")
    capsys.readouterr()  # what the fixture printed
    assert main("export", [str(folder), "--format", "gguf", "--output", str(output)]) == 2
    message = capsys.readouterr().err.strip()
    assert words in message
    assert "\n" not in message
    assert not output.exists()


def test_a_run_is_exported_like_its_merge_in_float32(train: Train, tmp_path: Path) -> None:
    run, merged = tmp_path / "run" / "model", tmp_path / "merged" / "model"
    shutil.copytree(train(), run)
    assert main("merge", [str(run), "--output", str(merged), "--dtype", "float32"]) == 0
    for folder in (run, merged):
        flags = ["--format", "gguf", "--output", str(folder.with_name("gguf")), "--square-images"]
        assert main("export", [str(folder), *flags]) == 0
    files = {file.name: file.read_bytes() for file in run.with_name("gguf").iterdir()}
    assert sorted(files) == ["Modelfile", "mmproj-f16.gguf", "model-f16.gguf"]
    assert files == {file.name: file.read_bytes() for file in merged.with_name("gguf").iterdir()}


def test_a_full_disk_is_reported_before_writing(
    model: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert main("export", [str(folder), "--format", "gguf", "--output", str(folder.with_name("gguf"))]) == 2
    assert "(0.1 GB), but 1,000 (0.0 GB) are free; free some space" in capsys.readouterr().err
    assert [file.name for file in folder.parent.iterdir()] == ["merged"]


def test_a_value_beyond_float16_and_a_missing_template(model: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model()
    net = LlavaForConditionalGeneration.from_pretrained(folder)
    net.lm_head.weight.data[3, 3] = 1e5
    net.save_pretrained(folder)
    flags = [str(folder), "--format", "gguf", "--output", str(folder.with_name("gguf"))]
    assert main("export", flags) == 2
    assert "output.weight has a value of 99840" in capsys.readouterr().err
    assert [file.name for file in folder.parent.iterdir()] == ["merged"]  # nothing partial is left
    (folder / "chat_template.jinja").unlink()
    assert main("export", flags) == 2
    assert "chat_template.jinja is missing" in capsys.readouterr().err
