"""Fuzz one reader by coverage, with atheris: `python tests/fuzz/guided.py TARGET [-max_total_time=600]`.

It needs `pip install ".[fuzz]"`. What follows the target is for libFuzzer, which saves the input of a crash in the
folder that it is started in.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["HF_HUB_OFFLINE"] = "1"

import atheris

with atheris.instrument_imports(include=["lora_llava", "ruamel", "PIL", "json", "csv"]):
    from lora_llava.recipe import shipped_generate_recipes, shipped_recipes
    from tests.fuzz.targets import TARGETS, attempt

BYTES = ("recipe", "bench", "images", "judge", "records")
"""Targets whose value is a file's content."""
_TEXT = ("recipe", "judge")


def main() -> None:
    """Fuzz until libFuzzer's limits are reached; it ends the process."""
    if len(sys.argv) < 2 or sys.argv[1] not in BYTES:
        sys.exit(f"name a target: {', '.join(BYTES)}")
    name = sys.argv.pop(1)
    warnings.simplefilter("ignore")

    def once(content: bytes) -> None:
        attempt(TARGETS[name], content.decode("utf-8", "ignore") if name in _TEXT else content)

    corpus = tempfile.mkdtemp()
    if name == "recipe":
        for file in [*shipped_recipes(), *shipped_generate_recipes()]:
            shutil.copy(file, corpus)
    atheris.Setup([*sys.argv, corpus], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
