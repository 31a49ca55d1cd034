"""Train with LLaMA-Factory and print seconds per step as JSON: run by the python of LLaMA-Factory's own environment.

    PYTHON llamafactory_side.py FOLDER '{"cutoff_len": 4096, ...}'

FOLDER holds `model`, and `data` with `rows.json`, `dataset_info.json` and the images (see `rivals.py`).
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

import torch
from llamafactory.data import collator
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Seconds of each optimizer step, loading of its batch included."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.times.append(now - self.start)
        self.start = now


def extend_position_ids() -> None:
    """Let packed rows without an image train: LLaMA-Factory adds a dummy image's tokens, but no positions (#10659)."""
    inner = collator.DataCollatorForSeq2Seq.__call__

    def call(self: Any, features: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        for feature in features:
            missing = len(feature["input_ids"]) - len(feature.get("position_ids", feature["input_ids"]))
            if missing:
                feature["position_ids"] = list(feature["position_ids"]) + [0] * missing
        return inner(self, features, *args, **kwargs)

    collator.DataCollatorForSeq2Seq.__call__ = call


def main() -> None:
    folder, own = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(own.pop("threads"))
    extend_position_ids()
    times = StepTimes()
    settings = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": f"{folder}/model",
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_target": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "additional_target": "multi_modal_projector",
        "template": "llava",
        "default_system": "",
        "dataset_dir": f"{folder}/data",
        "media_dir": f"{folder}/data",
        "dataset": "rows",
        "overwrite_cache": True,
        "output_dir": tempfile.mkdtemp(prefix="llamafactory_"),
        "overwrite_output_dir": True,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "flash_attn": "sdpa",
        **own,
    }
    run_exp(settings, callbacks=[times])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps({"times": times.times, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
