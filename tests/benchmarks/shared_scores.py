"""Scores of runs that share images, against runs that do not, on 8 questions about each image of the demo's world.

Each run trains the shipped recipe for own data on the demo's base, in steps of 16 samples, and answers 600 questions
about 75 other images. The paired comparison over seeds is printed at the end.

    python tests/benchmarks/shared_scores.py OUTPUT --stage1 runs/demo_align [--images 60] [--epochs 6] [--seeds 3]
        [--questions 0 10 4 2]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lora_llava.commands.main import main as run_verb
from lora_llava.demo.questions import plain_questions
from lora_llava.demo.world import draw, random_scene

_QUESTIONS = 8


def main() -> None:
    """Draw the rows, train with every setting and seed, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--stage1", type=Path, required=True, help="a finished run of demo_align.yaml")
    parser.add_argument("--images", type=int, default=60, help="images that are trained, at most 60")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, nargs="+", default=[0, 10, 4, 2], help="questions_per_image; 0 is off")
    args = parser.parse_args()
    write_rows(args.output / "data", args.images)
    runs = {most: [args.output / f"q{most}_seed{seed}" for seed in range(args.seeds)] for most in args.questions}
    for seed in range(args.seeds):
        for most in args.questions:
            share = [f"training.questions_per_image={most}"] if most else ["training.share_images=off"]
            if code := run_verb(None, [*_recipe(args), f"seed={seed}", f"output_dir={runs[most][seed]}", *share]):
                sys.exit(code)
    sys.exit(run_verb(None, ["compare", *[str(run) for most in args.questions for run in runs[most]]]))


def write_rows(folder: Path, trained: int) -> None:
    """Write `train.json`, `test.json` and their images, with 8 questions about each image."""
    rng, seen = random.Random(7), set[str]()
    (folder / "images").mkdir(parents=True)
    for split, images in (("train", 60), ("test", 75)):
        rows = []
        for number in range(images):
            scene = random_scene(rng, split)  # type: ignore[arg-type]
            while len(scene.things) == 1 or scene.key in seen:
                scene = random_scene(rng, split)  # type: ignore[arg-type]
            seen.add(scene.key)
            file = f"{split}_{number:04d}.png"
            draw(scene, rng).save(folder / "images" / file)
            pairs = plain_questions(scene)
            for thing in scene.things:
                pairs.append((f"Which colour is at the {thing.where}?", thing.colour))
                pairs.append((f"Which shape is {thing.colour}?", thing.shape))
            rng.shuffle(pairs)
            for place, (question, answer) in enumerate(pairs[:_QUESTIONS]):
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                rows.append({"id": f"{split}_{number}_{place}", "image": file, "conversations": turns})
        kept = rows[: trained * _QUESTIONS] if split == "train" else rows
        (folder / f"{split}.json").write_text(json.dumps(kept), encoding="utf-8")


def _recipe(args: argparse.Namespace) -> list[str]:
    data = args.output / "data"
    return [
        "finetune",
        "demo_my_data_qlora.yaml",
        f"data.path={data}/train.json",
        f"data.image_folder={data}/images",
        f"data.test_source={{format: conversations, path: {data}/test.json, image_folder: {data}/images}}",
        "data.validation_rows=0",
        f"model.start_from={{stage1_run: {args.stage1}}}",
        f"training.epochs={args.epochs}",
        "training.eval_every=null",
        "evaluation.before=0",
        "evaluation.shuffled=0",
        "evaluation.max_new_tokens=4",
        "evaluation.batch_size=32",
    ]


if __name__ == "__main__":
    main()
