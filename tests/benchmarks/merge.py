"""Measure peak memory and speed of `lora-llava merge` on random weights of real size, against a plain copy."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
"""Vicuna's shapes (config.json of lmsys/vicuna-7b-v1.5 and 13b)."""
RANK = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a small disk; default: all")
    parser.add_argument(
        "--image-size", type=int, default=336, help="smaller images make the check faster; default: 336"
    )
    parser.add_argument("--prompts", type=int, default=1, help="number of prompts of each kind; default: 1")
    parser.add_argument("--folder", type=Path, help="folder for the weights; default: a temporary folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write base and adapter, copy the base for comparison, and merge in a separate process."""
    folder = Path(tempfile.mkdtemp(prefix="merge-benchmark.", dir=args.folder))
    os.environ["LORA_LLAVA_CACHE"] = str(folder / "cache")
    try:
        base, run_folder = build(folder, args.shape, args.layers, args.image_size)
        shards = sorted(file.stat().st_size for file in base.glob("*.safetensors"))
        drop_pages(base)
        copy = copy_seconds(base, folder / "copy")
        drop_pages(base)
        measured = merge(run_folder, folder / "merged", args.prompts)
        report = json.loads((folder / "merged" / "merge_report.json").read_text())
    finally:
        shutil.rmtree(folder)
    total, largest, peak = sum(shards), shards[-1], measured["peak_rss_bytes"]
    return {
        "shape": args.shape,
        "layers": args.layers or SHAPES[args.shape]["num_hidden_layers"],
        "image_size": args.image_size,
        "rank": RANK,
        "prompts_of_each_kind": args.prompts,
        "bytes": total,
        "largest_shard_bytes": largest,
        "copy_mb_per_s": total / 1e6 / copy,
        "merge_mb_per_s": total / 1e6 / report["write_seconds"],
        "merge_speed_over_copy": copy / report["write_seconds"],
        "write_seconds": report["write_seconds"],
        "seconds_with_proof": measured["seconds"],
        "peak_rss_bytes": peak,
        "allowed_bytes": int(1.3 * largest + 2e9),
        "report": report,
    }


def build(folder: Path, shape: str, layers: int | None, image_size: int) -> tuple[Path, Path]:
    """Write a base of random weights and a run directory with a random adapter, as `finetune` does."""
    import torch
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict
    from transformers import CLIPImageProcessorPil, GenerationConfig

    from lora_llava.data.templates.named_templates import chat_template, get_template
    from lora_llava.demo.build import build_tokenizer
    from lora_llava.model.adapters import lora_config
    from lora_llava.model.base import assembled_config, build_processor
    from lora_llava.model.provenance import component_hashes
    from lora_llava.model.weights.streaming import build_empty
    from lora_llava.model.weights.tensor_files import LazyTensor, write_checkpoint, write_file
    from lora_llava.recipe.schema import LINEARS

    size = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    llm = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **size}
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": image_size,
        "patch_size": 14,
        "projection_dim": 768,
    }
    config = assembled_config(llm, vision, "mlp2x_gelu")
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, shape: torch.Size, std: float) -> LazyTensor:
        def load() -> torch.Tensor:
            if name.endswith("norm.weight") or ("layer_norm" in name and name.endswith("weight")):
                return torch.ones(shape)
            return torch.empty(shape, dtype=torch.bfloat16).normal_(0, std, generator=generator)

        return LazyTensor(name, tuple(shape), load)

    base, run_folder = folder / "base", folder / "run"
    base.mkdir()
    run_folder.mkdir()
    model = build_empty(config)
    write_checkpoint([drawn(n, p.shape, 0.02) for n, p in model.named_parameters()], base, torch.bfloat16)
    config.save_pretrained(base)
    lora = lora_config(r=RANK, alpha=128, targets=LINEARS, base=str(base))
    with torch.device("meta"):
        state = get_peft_model_state_dict(get_peft_model(model, lora))
    tensors = [drawn(name, tensor.shape, 0.01) for name, tensor in state.items()]
    write_file(tensors, run_folder / "adapter_model.safetensors", torch.float32)
    lora.inference_mode = True
    lora.save_pretrained(run_folder)
    tokenizer = build_tokenizer(0)
    tokenizer.add_tokens([f"<filler{i}>" for i in range(32000 - len(tokenizer))])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.padding_side = "left"
    images = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    template = chat_template(get_template("vicuna_v1", ""))
    build_processor(tokenizer, config, images, template).save_pretrained(run_folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=32001).save_pretrained(run_folder)
    recorded = {"name": str(base), "revision": None, "parts": None, "hashes": component_hashes(base)}
    (run_folder / "run.json").write_text(json.dumps({"stage": 2, "base": recorded}))
    return base, run_folder


def copy_seconds(source: Path, target: Path) -> float:
    """Return the seconds of a plain copy of the weights, synced to disk."""
    target.mkdir()
    start = time.monotonic()
    for file in source.glob("*.safetensors"):
        with file.open("rb") as read, (target / file.name).open("wb") as write:
            shutil.copyfileobj(read, write, 16 * 2**20)
            write.flush()
            os.fsync(write.fileno())
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def drop_pages(folder: Path) -> None:
    """Drop the files from the page cache, so that they are read from disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def merge(run_folder: Path, output: Path, prompts: int) -> dict[str, Any]:
    """Run `lora-llava merge` in a separate process and measure its peak resident set."""
    command = [
        *(sys.executable, "-m", "lora_llava.commands.main", "merge"),
        *(str(run_folder), "--output", str(output), "--prompts", str(prompts)),
    ]
    start = time.monotonic()
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": time.monotonic() - start, "peak_rss_bytes": peak}
