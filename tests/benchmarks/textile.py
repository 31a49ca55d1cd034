"""From class folders of textile images to a scored run, with one `init` and one `finetune`, on the demo's base.

The images are simulated textiles of the wheel `conformal-clip-data` (PyPI, 42 MB, MIT licence): `nominal`, or with a
`local` or a `global` defect. A part of them is copied to class folders below `train` and `test`, as a person would have
them; half of each part is nominal. The test folder is asked before and after training. The demo's tower sees 64 x 64
pixels and was trained on coloured shapes.

    python tests/benchmarks/textile.py OUTPUT [--wheel FILE] [--stage1 runs/demo_align] [--train 400] [--test 200]
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import sys
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lora_llava.commands.main import main as run_verb
from lora_llava.runs.directory import machine, versions

_IMAGES = "conformal_clip_data/data/textile_images/simulated"
_SHARES = {"nominal": 0.5, "local": 0.25, "global": 0.25}
"""The classes and their shares, which are those of the wheel."""


def main() -> None:
    """Make the folders, run `init` and `finetune`, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--wheel", type=Path, help="the wheel's file; default: the installed package")
    parser.add_argument("--stage1", type=Path, help="a finished run of demo_align.yaml; default: it is trained first")
    parser.add_argument("--train", type=int, default=400, help="images below train")
    parser.add_argument("--test", type=int, default=200, help="images below test")
    args = parser.parse_args()
    images, run = args.output / "textile", args.output / "run"
    counts = write_class_folders(images, args.wheel, {"train": args.train, "test": args.test})
    stage1 = [f"model.start_from={{stage1_run: {args.stage1}}}"] if args.stage1 else []
    recipe = [str(images / "recipe.yaml"), f"output_dir={run}", "training.early_stopping={patience: 5}", *stage1]
    seconds = {}
    for command in (["init", str(images), "--model", "demo"], ["finetune", *recipe]):
        start = time.process_time(), time.monotonic()
        if code := run_verb(None, command):
            sys.exit(code)
        cpu, clock = time.process_time() - start[0], time.monotonic() - start[1]
        seconds[command[0]] = {"cpu": round(cpu), "clock": round(clock)}
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    print(json.dumps({"images": counts, "seconds": seconds, "figures": metrics["figures"]}, indent=1))
    print(json.dumps({"machine": machine(), "versions": versions()}, indent=1))


def write_class_folders(folder: Path, wheel: Path | None, counts: dict[str, int]) -> dict[str, dict[str, int]]:
    """Copy images to `folder/SPLIT/CLASS`, none of them twice.

    Args:
        folder: A new folder.
        wheel: The wheel; None for the installed package.
        counts: The number of images of each split.

    Returns:
        The number of images of each split and class.
    """
    written: dict[str, dict[str, int]] = {split: {} for split in counts}
    root = zipfile.Path(wheel) if wheel else importlib.resources.files("conformal_clip_data").parent
    for kind, share in _SHARES.items():
        files = sorted((root / _IMAGES / kind).iterdir(), key=lambda file: file.name)
        files = [file for file in files if file.name.endswith(".jpg")]
        for split, count in counts.items():
            chosen, files = files[: round(count * share)], files[round(count * share) :]
            target = folder / split / kind
            target.mkdir(parents=True)
            for file in chosen:
                (target / file.name).write_bytes(file.read_bytes())
            written[split][kind] = len(chosen)
    return written


if __name__ == "__main__":
    main()
