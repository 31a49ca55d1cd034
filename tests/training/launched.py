"""The fine-tuning script started as a person or a launcher starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_llava.recipe import dump_recipe
from lora_llava.recipe.io import check_recipe

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def finetune(
    content: Mapping[str, Any], folder: Path, launcher: list[str], *options: str,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run `scripts/finetune.py`.

    Args:
        content: Of the recipe, without `output_dir`.
        folder: The run directory; the recipe is written beside it.
        launcher: What Python runs the script by; nothing, or `LAUNCHER`.
        options: Of the script.
        environment: Set besides this process's own.
    """
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(dump_recipe(check_recipe({**content, "output_dir": str(folder)}, "test")))
    command = [sys.executable, *launcher, str(SCRIPT), str(recipe), *options]
    environment = os.environ | {"COLUMNS": "120"} | dict(environment or {})
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
