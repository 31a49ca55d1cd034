"""Run jobs from standard input on a card that is not there; started by `launch.simulate`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  before torch believes in a card

import lora_llava.benchmark.benchmark_sides
import lora_llava.training.finetune  # noqa: F401
from lora_llava.core.quiet import quieten
from tests.simulation import fake_card, simulated_step, stand_ins
from tests.simulation.settings import Setting

CARD = 24 * 2**30
KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "whole": lambda meters, setting: simulated_step.measure_whole(Setting(**setting), meters),
    "depth": lambda meters, setting: simulated_step.measure_at_depth(Setting(**setting), meters),
}


def main() -> None:
    jobs = json.load(sys.stdin)
    warnings.simplefilter("ignore")  # of libraries that meet fake tensors
    quieten()
    stand_ins.install()
    meters = fake_card.pretend(CARD)
    found = [KINDS[job.pop("kind")](meters, **job) for job in jobs]
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # taking fake tensors apart at the end crashes
