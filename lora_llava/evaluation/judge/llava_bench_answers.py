"""`lora-llava evaluate MODEL --benchmark llava-bench`: answer LLaVA-Bench's questions for a judge to score."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation, Turn
from lora_llava.data.images.image_sources import FolderImages
from lora_llava.data.typed import as_typed
from lora_llava.evaluation.answerers import Answerer, by_server
from lora_llava.evaluation.asked.spoken_answers import by_speaker, weights_of
from lora_llava.evaluation.judge.llava_bench import BenchQuestion, read_questions
from lora_llava.evaluation.row_evaluation import evaluate_rows
from lora_llava.inference.answer import Answer
from lora_llava.inference.client.client import ChatServer, find_model
from lora_llava.inference.open_model import background_of, open_speaker
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import MAX_IMAGE_PIXELS
from lora_llava.runs.directory import machine, versions, write_json

ANSWERS_FILE = "llava_bench_answers.jsonl"


def answer_llava_bench(
    model: str,
    questions: Path,
    images: Path,
    *,
    output: Path | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    bad_images: Literal["error", "wrong"] = "error",
    server: ChatServer | None = None,
    template: str | None = None,
    quantization: Literal["auto", "nf4", "none"] = "auto",
) -> Path:
    """Answer LLaVA-Bench's questions and write the answers in the format of LLaVA's scripts.

    Args:
        model: A run directory, a folder with a complete LLaVA, or a Hub id; with a server the model's name there.
        questions: LLaVA-Bench's file of questions.
        images: Folder with its images; COCO's may have the file names of either release.
        output: Folder for the answers; by default the model's folder, else the working directory.
        sampling: How tokens are sampled; by default greedily, up to 1,024 tokens (llava/eval/model_vqa.py).
        batch_size: Questions in one batch.
        bad_images: `error`, or `wrong`: a question whose image cannot be opened gets an empty answer and is listed.
        server: The server that answers, in place of a local model.
        template: Conversation template in place of the model's own.
        quantization: See `open_speaker`.

    Returns:
        The file: JSONL of `question_id`, `text`, `category`, `model_id`.

    Raises:
        UserError: If a file, a folder or the model is missing or does not fit.
    """
    if not images.is_dir():
        raise UserError(f"--images: {images} is not a folder; name the folder with the benchmark's images")
    sampling = sampling or Sampling(max_new_tokens=1024)
    rows = [_conversation(question) for question in read_questions(questions)]
    source = FolderImages(images, MAX_IMAGE_PIXELS, background=background_of(model), has_key=False)
    answerer: Answerer
    about: dict[str, Any] = {
        "benchmark": "llava-bench",
        "questions": file_hash(questions),
        "sampling": asdict(sampling),
        "background": source.background,
    }
    if server is not None:
        server = find_model(server)
        answerer = by_server(server, source, sampling, None)
        about |= {"server": server.url, "model": server.model}
    else:
        speaker = open_speaker(model, quantization=quantization, template=template)
        answerer = by_speaker(speaker, source, batch_size, sampling)
        about |= {"model": model, "weights": weights_of(model), "template": template, "batch_size": batch_size}
    folder = output or (Path(model) if Path(model).is_dir() else Path())
    name = str(about["model"])

    def score_row(index: int, row: Conversation, answer: Answer) -> dict[str, Any]:
        return {"question_id": row.row_id, "text": answer.text, "category": row.extra["category"], "model_id": name}

    scored = evaluate_rows(
        rows,
        answerer,
        score_row,
        predictions=folder / ANSWERS_FILE,
        description="LLaVA-Bench",
        key=about,
        bad_images=bad_images,
    )
    bad = [line["question_id"] for line in scored if "problem" in line]
    summary = {"asked": about, "questions": len(scored), "unopened_images": bad}
    summary |= {"machine": machine(), "versions": versions()}
    write_json(folder / ANSWERS_FILE.replace(".jsonl", ".json"), summary)
    return folder / ANSWERS_FILE


def _conversation(question: BenchQuestion) -> Conversation:
    text = as_typed(question.text, [IMAGE_PLACEHOLDER])
    turns = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{text}"), Turn("assistant", "?"))
    return Conversation(question.question_id, turns, (question.image,), {"category": question.category})
