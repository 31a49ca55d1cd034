"""A tiny LLaVA-1.6 in LLaVA's own format, and LLaVA's computation of its logits, written plainly: tile after tile."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
)

from tests.tiny_tower import tiny_tower

TILE, PATCHES = 32, 4
CANVASES = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
"""Width and height, as LLaVA writes them."""
PROMPTS = {
    "llama": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:",
    "mistral": "[INST] <image>\n{} [/INST]",
}
"""LLaVA's templates `v1`, with which it trains, and `mistral_instruct`."""


class OwnLlava:
    """A LLaVA-1.6 of random weights: its parts, and its files.

    Args:
        tokenizer: Folder of the tokenizer.
        kind: `llama` or `mistral`.
    """

    def __init__(self, tokenizer: Path, kind: str = "llama") -> None:
        self.tokenizer_folder, self.tokenizer = tokenizer, AutoTokenizer.from_pretrained(tokenizer)
        vision = tiny_tower(TILE, TILE // PATCHES)
        self.llm_config: dict[str, Any] = {
            "vocab_size": len(self.tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "tie_word_embeddings": False,
        }
        if kind == "mistral":
            self.llm_config |= {"rope_scaling": None, "rope_theta": 1e6, "sliding_window": 48}
        config = (LlamaConfig if kind == "llama" else MistralConfig)(**self.llm_config)
        torch.manual_seed(0)
        self.kind = kind
        self.llm = _rounded(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
        # Tokens of single bytes are never the likeliest, as texts of broken characters cannot be compared.
        unreadable = [index for token, index in self.tokenizer.get_vocab().items() if token.startswith("<0x")]
        self.llm.lm_head.weight.data[unreadable] = 0
        self.tower = _rounded(CLIPVisionModel(vision))
        self.projector = _rounded(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64)))
        self.newline = torch.randn(64).bfloat16().float()

    def config(self, tower: Path, **changes: Any) -> dict[str, Any]:
        """Return LLaVA's config.json, with the settings of liuhaotian/llava-v1.6-vicuna-7b."""
        return {
            **self.llm_config,
            "architectures": ["LlavaLlamaForCausalLM" if self.kind == "llama" else "LlavaMistralForCausalLM"],
            "freeze_mm_mlp_adapter": False,
            "freeze_mm_vision_resampler": False,
            "image_aspect_ratio": "anyres",
            "image_crop_resolution": 224,
            "image_grid_pinpoints": CANVASES,
            "image_split_resolution": 224,
            "max_length": 4096,
            "mm_hidden_size": 32,
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_lr": None,
            "mm_projector_type": "mlp2x_gelu",
            "mm_resampler_type": None,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": str(tower),
            "mm_vision_tower_lr": 2e-06,
            "model_type": f"llava_{self.kind}",
            "tokenizer_model_max_length": 4096,
            "tokenizer_padding_side": "right",
            "torch_dtype": "bfloat16",
            "tune_mm_mlp_adapter": False,
            "tune_mm_vision_resampler": False,
            "unfreeze_mm_vision_tower": True,
            "use_cache": True,
            "use_mm_proj": True,
            **changes,
        }

    def save(self, folder: Path, **changes: Any) -> Path:
        """Write the checkpoint beside a folder `clip` of another tower, which the checkpoint's own replaces."""
        other = _rounded(CLIPVisionModel(self.tower.config))
        other.save_pretrained(folder.parent / "clip")
        folder.mkdir()
        tensors = dict(self.llm.state_dict())
        tower = {_original_tower(name): tensor for name, tensor in self.tower.state_dict().items()}
        tensors |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
        tensors |= {f"model.mm_projector.{name}": tensor for name, tensor in self.projector.state_dict().items()}
        tensors["model.image_newline"] = self.newline
        rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        if self.kind == "llama":
            torch.save(rounded, folder / "pytorch_model.bin")
        else:
            save_file(rounded, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config(folder.parent / "clip", **changes)))
        for file in self.tokenizer_folder.glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder

    def train(self, *, newline: bool) -> None:
        """Add LoRA of random weights, and change the projector and, if asked, the newline."""
        torch.manual_seed(1)
        self.before = {name: tensor.clone() for name, tensor in self.llm.state_dict().items()}
        self.lora = {}
        for name, parameter in self.llm.named_parameters():
            if "_proj.weight" in name:
                for half, shape in (("A", (4, parameter.shape[1])), ("B", (parameter.shape[0], 4))):
                    self.lora[f"{name.removesuffix('.weight')}.lora_{half}.weight"] = torch.randn(shape) / 8
                a, b = list(self.lora.values())[-2:]
                parameter.data += 32 / 4 * b @ a
        self.projector.load_state_dict({n: t + torch.randn_like(t) / 8 for n, t in self.projector.state_dict().items()})
        self.other = {f"mm_projector.{name}": tensor for name, tensor in self.projector.state_dict().items()}
        if newline:
            self.newline = torch.randn(64)
            self.other["image_newline"] = self.newline

    def save_parts(self, folder: Path) -> Path:
        """Write language model (as before training) and tower, as the parts that LLaVA's training starts from."""
        trained = self.llm.state_dict()
        self.llm.config.architectures = None
        self.llm.save_pretrained(folder / "llm", state_dict=getattr(self, "before", trained))
        for file in self.tokenizer_folder.glob("tokenizer*"):
            shutil.copy(file, folder / "llm")
        self.tower.save_pretrained(folder / "tower")
        return folder

    def save_lora(self, folder: Path, llm: Path, tower: Path, **changes: Any) -> Path:
        """Write LLaVA's LoRA folder of a trained one."""
        folder.mkdir()
        torch.save(
            {f"base_model.model.{name}": tensor for name, tensor in self.lora.items()}, folder / "adapter_model.bin"
        )
        others = {f"base_model.model.model.{name}": tensor for name, tensor in self.other.items()}
        torch.save(others, folder / "non_lora_trainables.bin")
        names = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in self.lora})
        settings = {"base_model_name_or_path": str(llm), "peft_type": "LORA", "r": 4, "lora_alpha": 32, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": names}))
        (folder / "config.json").write_text(json.dumps(self.config(tower, **changes)))
        return folder

    @torch.no_grad()
    def logits(self, question: str, image: Image.Image) -> torch.Tensor:
        """Compute the logits of a prompt; its text before and after the image is encoded apart."""
        before, after = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in PROMPTS[self.kind].format(question).split("<image>")
        )
        embed = self.llm.get_input_embeddings()
        text = [embed(torch.tensor(ids)) for ids in ([1, *before], after)]
        together = torch.cat([text[0], self.image_vectors(image), text[1]])
        logits: torch.Tensor = self.llm.eval()(inputs_embeds=together[None]).logits
        return logits

    @torch.no_grad()
    def image_vectors(self, image: Image.Image) -> torch.Tensor:
        """Compute an image's vectors: the whole image, then the lines of the canvas without padding."""
        clip = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
        width, height = best_canvas(image.size)
        pixels = clip([image.resize((TILE, TILE)), *tiles(image, width, height)], return_tensors="pt")["pixel_values"]
        features = self.tower.eval()(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        whole, *rest = self.projector(features)
        lines = []
        across, down = width // TILE, height // TILE
        for row in range(down * PATCHES):
            line = []
            for column in range(across * PATCHES):
                tile = rest[row // PATCHES * across + column // PATCHES]
                line.append(tile[row % PATCHES * PATCHES + column % PATCHES])
            lines.append(line)
        padded_rows, padded_columns = padding(image.size, across * PATCHES, down * PATCHES)
        kept = [line[padded_columns : len(line) - padded_columns] for line in lines]
        kept = kept[padded_rows : len(kept) - padded_rows]
        return torch.stack([*whole, *(vector for line in kept for vector in [*line, self.newline])])


def best_canvas(size: tuple[int, int]) -> tuple[int, int]:
    """Return width and height of the canvas: most pixels of the image, then least waste, then the first."""
    best: tuple[float, float] = (0, -math.inf)
    found = (0, 0)
    for width, height in CANVASES:
        scale = min(width / size[0], height / size[1])
        used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        if (used, used - width * height) > best:
            best, found = (used, used - width * height), (width, height)
    return found


def tiles(image: Image.Image, width: int, height: int) -> Iterator[Image.Image]:
    """Scale an image into a black canvas, and cut it line by line."""
    across, down = width / image.width, height / image.height
    if across < down:
        size = (width, min(math.ceil(image.height * across), height))
    else:
        size = (min(math.ceil(image.width * down), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size), ((width - size[0]) // 2, (height - size[1]) // 2))
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            yield canvas.crop((left, top, left + TILE, top + TILE))


def padding(size: tuple[int, int], across: int, down: int) -> tuple[int, int]:
    """Return the lines, and the columns, of patches on each side of the image that are padding alone."""
    if size[0] / size[1] > across / down:
        return (down - int(size[1] * (across / size[0]))) // 2, 0
    return 0, (across - int(size[0] * (down / size[1]))) // 2


def _rounded(module: Any) -> Any:
    """Round a model's weights to bfloat16, in which an imported one is stored."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return module


def _original_tower(name: str) -> str:
    return name if name.startswith("vision_model.") else f"vision_model.{name}"
