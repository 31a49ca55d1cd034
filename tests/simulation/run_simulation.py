"""Run jobs on a card that is not there; started by `launch.simulate`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  before torch believes in a card
import torch

import lora_llava.benchmark.benchmark_sides
import lora_llava.training.finetune  # noqa: F401
from lora_llava.core.quiet import quieten
from lora_llava.model.fast_path.attention import choose_kernel
from tests.simulation import (
    fake_card,
    simulated_answers,
    simulated_branches,
    simulated_run,
    simulated_step,
    simulated_trl,
    stand_ins,
)
from tests.simulation.settings import CARD, Setting

KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "whole": lambda meters, setting: simulated_step.measure_whole(Setting(**setting), meters),
    "depth": lambda meters, setting: simulated_step.measure_at_depth(Setting(**setting), meters),
    "fragments": lambda meters, setting: simulated_step.measure_fragments(Setting(**setting), meters),
    "trl": lambda meters, setting: simulated_trl.measure_trl(Setting(**setting), meters),
    "answers": lambda meters, setting, **options: simulated_answers.measure_answers(
        Setting(**setting), meters, **options
    ),
    "branches": lambda meters: simulated_branches.run_branches(meters),
    "finetune": lambda meters, **options: simulated_run.run_finetune(meters=meters, **options),
}


def main() -> None:
    jobs, found = json.loads(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("ignore")  # of libraries that meet fake tensors
    quieten()
    stand_ins.install()
    meters = fake_card.pretend(CARD)
    with fake_card.FakeMode():  # plans are made outside of it
        choose_kernel(torch.device("cuda", 0))
    for job in jobs:
        result = KINDS[job.pop("kind")](meters, **job)
        with found.open("a") as stream:
            stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # taking fake tensors apart at the end crashes
