"""How many planted faults `lora-llava inspect` finds on the demo's world.

Rows in the form of own data are drawn; 5% get the answer of another row of the same kind of question,
and 5% get the image of another row, in which their answer is wrong. The shipped recipe for own data on the demo's base
is trained on them, and `inspect` ranks all rows, training and held-out, by how surprising their answer is. Precision at
the planted count is the share of planted rows among as many first rows of that ranking; for one fault alone, rows with
the other fault are left out.

    python tests/benchmarks/inspect_planted.py OUTPUT --stage1 runs/demo_align [--rows 1000] [--epochs 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lora_llava.commands.main import main as run_verb
from lora_llava.runs.directory import machine, versions
from tests.planted_rows import PlantedRow, write_planted


def main() -> None:
    """Plant, train, inspect and print the precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--stage1", type=Path, required=True, help="a finished run of demo_align.yaml")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--labels", type=float, default=0.05, help="share of rows with another row's answer")
    parser.add_argument("--images", type=float, default=0.05, help="share of rows with a swapped image")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    planted = write_planted(args.output / "data", args.rows, args.labels, args.images, args.seed)
    run, seconds = args.output / "run", {}
    recipe = [
        "finetune",
        "demo_my_data_qlora.yaml",
        f"data.path={args.output}/data/questions.csv",
        f"data.image_folder={args.output}/data/images",
        f"model.start_from={{stage1_run: {args.stage1}}}",
        f"output_dir={run}",
        "data.validation_rows=80",
        f"training.epochs={args.epochs}",
        "training.eval_every=50",
        "evaluation.before=8",
    ]
    for name, command in (("train", recipe), ("inspect", ["inspect", str(run)])):
        start = time.process_time(), time.monotonic()
        if code := run_verb(None, command):
            sys.exit(code)
        seconds[name] = {"cpu": round(time.process_time() - start[0]), "clock": round(time.monotonic() - start[1])}
    about = {"rows": len(planted), "epochs": args.epochs, "seed": args.seed, "seconds": seconds}
    with (run / "inspect.csv").open(newline="", encoding="utf-8") as stream:
        found = precisions(list(csv.DictReader(stream)), planted)
    print(json.dumps(about | found | {"machine": machine(), "versions": versions()}, indent=1))


def precisions(table: list[dict[str, str]], planted: list[PlantedRow]) -> dict[str, dict[str, float]]:
    """Return planted rows, precision at that count, and the same for each fault without the rows of the other."""
    ranked = sorted(table, key=lambda row: int(row["surprise_rank"]))
    faults = [planted[int(row["row_id"])].fault for row in ranked]
    found = {"both": _precision([bool(fault) for fault in faults])}
    for kind in ("label", "image"):
        found[kind] = _precision([fault == kind for fault in faults if fault in ("", kind)])
    return found


def _precision(is_planted: list[bool]) -> dict[str, float]:
    count = sum(is_planted)
    return {"planted": count, "precision": round(sum(is_planted[:count]) / count, 3) if count else 0.0}


if __name__ == "__main__":
    main()
