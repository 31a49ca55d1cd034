"""`lora-llava init`: write a recipe for a folder of images, questions and answers."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, home
from lora_llava.core.quiet import quieten

SUMMARY = "write and check a recipe for a folder of your own images"
EXAMPLES = (
    "lora-llava init my_images",
    "lora-llava init my_images --columns image=Bild,question=Frage,answer=Antwort",
    "lora-llava init my_images --example --model demo",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=a_path,
        help="folder of images with a table, a workbook, class folders, or an export of COCO, Label Studio, CVAT, VQA, "
        "YOLO, WebDataset or Hugging Face",
    )
    parser.add_argument(
        "--data", type=a_path, metavar="FILE", help="file with the rows or labels; default: the only one in the folder"
    )
    parser.add_argument(
        "--model",
        type=home,
        metavar="MODEL",
        help="complete LLaVA to start from: a folder, a Hub id, or demo; default: the recipe's",
    )
    parser.add_argument(
        "--llm",
        type=home,
        metavar="MODEL",
        help="language model for a new LLaVA, instead of --model: a folder or Hub id; default: none",
    )
    parser.add_argument(
        "--vision-tower", type=home, metavar="MODEL", help="its vision tower; default: CLIP ViT-L/14 at 336 pixels"
    )
    parser.add_argument(
        "--recipe",
        type=home,
        metavar="NAME",
        help="shipped recipe to fill in: my_data_qlora.yaml, my_data_highres_qlora.yaml, or my_data_8gb.yaml and "
        "my_data_highres_12gb.yaml for a small GPU; default: the first, or the second if --model is a LLaVA-1.6",
    )
    _add_folder_options(parser)
    parser.add_argument("--example", action="store_true", help="create the folder first, with example images")
    parser.add_argument(
        "--follow-links", action="store_true", help="follow symbolic links in the folder, even to images outside it"
    )


def _add_folder_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the folder is to be understood."""
    group = parser.add_argument_group("how to read the folder, where it is not understood by itself")
    group.add_argument(
        "--columns",
        type=_columns,
        metavar="ROLE=NAME,...",
        default={},
        help="columns of a table: image=Bild,question=Frage,answer=Antwort; also caption, label and id",
    )
    group.add_argument("--sheet", metavar="NAME", help="sheet of a workbook; default: the one with understood columns")
    group.add_argument(
        "--question",
        metavar="TEXT",
        help="question asked of each image that only has a class or label; default: one that names the classes",
    )
    group.add_argument(
        "--label-is",
        choices=["class", "caption"],
        help="what the label of a table of images and labels is; default: decided by the labels, and printed",
    )
    group.add_argument(
        "--ask",
        type=_words,
        metavar="KIND,...",
        default=(),
        help="what to ask about boxes: presence,count,place, or captions; default: captions where there are some, else "
        "all three",
    )
    group.add_argument(
        "--class-folders", action="store_true", help="the folder of an image is its class, even if there is a table"
    )
    parser.add_argument(
        "--update", action="store_true", help="refresh the data part of the recipe that init wrote; your changes stay"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what was understood and write nothing")
    parser.add_argument("--yes", action="store_true", help="ask nothing at the terminal; take the defaults")


def _columns(text: str) -> dict[str, str]:
    """Convert `image=Bild,question=Frage` to columns by role; a name may have commas if it has no `=`.

    Raises:
        argparse.ArgumentTypeError: For text without `=`.
    """
    found: dict[str, str] = {}
    role = ""
    for part in text.split(","):
        name, equals, column = part.partition("=")
        if equals and name.strip():
            role = name.strip().lower()
            found[role] = column.strip()
        elif role:
            found[role] += f",{part}"
        else:
            raise argparse.ArgumentTypeError(f"{part!r} should be ROLE=NAME, such as image=Bild")
    empty = next((role for role, column in found.items() if not column.strip()), None)
    if empty is not None:
        raise argparse.ArgumentTypeError(f"{empty}= names no column; write {empty}=NAME")
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip().lower() for word in text.split(",") if word.strip())


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.data.folder_kinds.folder_kind import FolderOptions
    from lora_llava.prepare.new_recipe import init
    from lora_llava.prepare.terminal_asker import asker_for

    options = FolderOptions(
        columns=args.columns,
        sheet=args.sheet,
        question=args.question,
        label_is=args.label_is,
        ask=args.ask,
        class_folders=args.class_folders,
        asker=asker_for(console, args.yes),
    )
    _, report = init(
        args.folder,
        data=args.data,
        model=args.model,
        llm=args.llm,
        vision_tower=args.vision_tower,
        template=args.recipe,
        example=args.example,
        follow_links=args.follow_links,
        options=options,
        update=args.update,
        dry_run=args.dry_run,
        console=console,
    )
    return 1 if report.errors else 0
