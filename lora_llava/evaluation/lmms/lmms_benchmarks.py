"""`lora-llava evaluate MODEL --benchmark lmms:TASKS`: public benchmarks, with lmms-eval's prompts and scores."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_llava.core.errors import ReportedError, UserError, nearest
from lora_llava.evaluation.asked.spoken_answers import weights_of
from lora_llava.evaluation.lmms.benchmark_table import numbers
from lora_llava.evaluation.lmms.task_questions import TaskAsker, file_name
from lora_llava.evaluation.row_evaluation import report
from lora_llava.evaluation.run_report import REPORT_FILE, rebuild_report
from lora_llava.inference.client.client import ChatServer, find_model
from lora_llava.inference.load import load_processor, use_tiles_of
from lora_llava.inference.open_model import background_of, open_speaker
from lora_llava.model.adapter_file import checked_base
from lora_llava.model.start import plan_model
from lora_llava.recipe import ModelSection, StartFrom
from lora_llava.runs.check_run import check_run
from lora_llava.runs.directory import METRICS_FILE, is_run, machine, read_record, versions, write_json

_ASKED_AS = "llava_hf"
"""lmms-eval's name of LLaVA in transformers: tasks may have a prompt of their own for it."""
_INSTALL = "pip install 'lora_llava[bench]'"
_KINDS = ("generate_until", "loglikelihood", "multiple_choice")


def check_lmms() -> None:
    """Check that lmms-eval can be imported.

    Raises:
        UserError: Naming what to install.
    """
    if find_spec("lmms_eval") is None:
        raise UserError(f"--benchmark lmms: lmms-eval is not installed; {_INSTALL}")
    if find_spec("filelock._api") is None:  # lmms-eval 0.7 imports it; filelock 4 does not have it
        raise UserError(f"--benchmark lmms: lmms-eval needs filelock before version 4; {_INSTALL}")
    try:
        import lmms_eval.evaluator  # noqa: F401
        from loguru import logger
    except ImportError as error:
        raise UserError(f"--benchmark lmms: lmms-eval cannot be imported ({error}); {_INSTALL}") from None
    logger.remove()
    logger.add(sys.stderr, level="ERROR", format="lmms-eval: {message}")


def run_lmms(
    model: str,
    names: Sequence[str],
    *,
    base_only: bool = False,
    limit: int | None = None,
    output: Path | None = None,
    server: ChatServer | None = None,
) -> dict[str, dict[str, Any]]:
    """Ask the questions of lmms-eval's tasks and score the answers as the tasks do.

    The scores of each task are on disk before the next task is asked, in `lmms_TASK.json`. Those of a model here on all
    questions are added to its `metrics.json`, and to the report of a run.

    Args:
        model: A run directory, a folder with a complete LLaVA, or a Hub id; with a server the model's name there.
        names: Names of tasks or groups, or YAML files of tasks.
        base_only: Whether to ask a run's base without its trained weights.
        limit: Most questions of each task, the first ones.
        output: Folder for answers and scores; by default the model's folder, else the working directory.
        server: The server that answers, in place of a local model.

    Returns:
        By task: `questions`, and the scores under `before` for a base, else under `after`; with the other side where
        the run has it.

    Raises:
        UserError: If lmms-eval, a task or its data is missing, or a task asks what a LLaVA cannot answer.
    """
    check_lmms()
    if server is None:  # before data is downloaded
        check_run(model, "a run, a folder with a complete LLaVA, or a Hub id", hub=True)
    tasks = _open_tasks(names, server is not None)
    folder = output or (Path(model) if Path(model).is_dir() else Path())
    folder.mkdir(parents=True, exist_ok=True)
    asker = _asker(model, base_only, limit, folder, server)
    record = output is None and limit is None and server is None and (folder / METRICS_FILE).is_file()
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        start = time.monotonic()
        scores, questions = _score(asker, task, limit)
        name = task.config.task
        summary = {
            "benchmark": name,
            "scores": scores,
            "asked": {**asker.about, "model": model, "limit": limit},
            "took": {"seconds": round(time.monotonic() - start, 2), "questions": questions},
        }
        file = folder / f"lmms_{file_name(name)}{asker.suffix}.json"
        write_json(file, {**summary, "machine": machine(), "versions": versions()})
        entry = {"questions": questions, "before" if base_only else "after": scores}
        found[name] = _recorded(folder / METRICS_FILE, name, entry) if record else entry
    if record and (folder / REPORT_FILE).is_file():
        try:
            rebuild_report(str(folder))
        except UserError as error:
            report(f"{folder / REPORT_FILE} was not written again: {error}")
    return found


def _open_tasks(names: Sequence[str], served: bool) -> list[Any]:
    """Return the tasks of these names with their data, each once.

    Raises:
        UserError: If a task is unknown, its data cannot be loaded, or it asks what is not answered here.
    """
    from lmms_eval.tasks import TaskManager, get_task_dict

    files = {name: Path(name).absolute() for name in names if name.endswith((".yaml", ".yml"))}
    for name, file in files.items():
        if not file.is_file():
            raise UserError(f"--benchmark lmms: {name} does not exist; name the YAML file of a task")
    folders = sorted({str(file.parent) for file in files.values()})
    shipped = len(files) < len(names)  # indexing lmms-eval's own tasks takes seconds
    manager = TaskManager("ERROR", include_path=folders, include_defaults=shipped, model_name=_ASKED_AS)
    tasks: dict[str, Any] = {}
    for given in names:
        name = _name_in(files[given], manager) if given in files else given
        if name not in manager.all_tasks:
            raise UserError(
                f"--benchmark lmms: lmms-eval has no task {name}{nearest(name, manager.all_tasks)}; "
                "python -m lmms_eval --tasks list lists them"
            )
        try:
            asked = get_task_dict([name], manager)
        except Exception as error:  # lmms-eval and datasets raise anything for data that is not there
            raise UserError(f"{name}: lmms-eval cannot load it ({_reason(error)}); fix that, or leave it out") from None
        for task in _leaves(asked):
            kind = task.OUTPUT_TYPE
            if kind not in _KINDS or (served and kind != "generate_until"):
                why = "needs the model, not a server" if kind in _KINDS else "is not answered here"
                raise UserError(f"{task.config.task}: its kind of question, {kind}, {why}; leave it out")
            tasks[task.config.task] = task
    return list(tasks.values())


def _name_in(file: Path, manager: Any) -> str:
    """Return the name of the task in a YAML file."""
    for name, entry in manager.task_index.items():
        if entry["yaml_path"] != -1 and Path(entry["yaml_path"]).absolute() == file:
            return str(name)
    raise UserError(f"--benchmark lmms: {file} has no key `task`; name the YAML file of a task")


def _reason(error: BaseException) -> str:
    last = getattr(error, "last_attempt", None)  # lmms-eval tries downloads several times
    cause = (last.exception() if last is not None else None) or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"


def _leaves(tasks: Any) -> Iterator[Any]:
    """Yield the tasks of a nested dictionary of groups."""
    for each in tasks.values() if isinstance(tasks, dict) else [tasks]:
        task = each[1] if isinstance(each, tuple) else each
        if isinstance(task, dict):
            yield from _leaves(task)
        elif task is not None:
            yield task


def _asker(model: str, base_only: bool, limit: int | None, folder: Path, server: ChatServer | None) -> TaskAsker:
    """Load the model, or find it on the server."""
    about: dict[str, Any] = {"lmms_eval": version("lmms_eval")}
    suffix = "_base" * base_only + "_server" * (server is not None) + (f"_limit{limit}" if limit is not None else "")
    here = Path(model)
    place: dict[str, Any] = {"folder": folder, "suffix": suffix, "background": background_of(model)}
    if server is None:
        about |= {"weights": weights_of(model, base_only), "base_only": base_only}
        return TaskAsker(open_speaker(model, base_only=base_only), None, about=about, **place)
    if server.model is None and not here.is_dir():
        server = replace(server, model=model)
    server = find_model(server)
    about |= {"server": server.url, "served_model": server.model}
    if not here.is_dir():
        return TaskAsker(None, server, about=about, **place)
    base = str(checked_base(read_record(here), here)) if is_run(here) else model
    config = plan_model(ModelSection(start_from=StartFrom(llava=base))).config
    processor = load_processor(here)
    use_tiles_of(config, processor.image_processor.to_dict())
    return TaskAsker(None, server, about=about, processor=processor, config=config, **place)


def _score(asker: TaskAsker, task: Any, limit: int | None) -> tuple[dict[str, float], int]:
    """Ask the questions of one task; return its scores and the number of its questions."""
    from lmms_eval.evaluator import simple_evaluate

    from lora_llava.evaluation.lmms.lmms_model import LmmsModel

    name = task.config.task
    try:
        results = simple_evaluate(
            LmmsModel(asker), tasks=[task], limit=limit, bootstrap_iters=0, log_samples=False, verbosity="ERROR"
        )
    except (ReportedError, OSError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # a task's own code, such as a judge without a key
        raise UserError(f"{name}: lmms-eval cannot score it ({_reason(error)}); fix that, or leave it out") from error
    counts = results["n-samples"][name]
    return numbers(results["results"][name]), int(counts["effective"])


def _recorded(file: Path, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Add scores to the metrics of a run, and return what is known of the benchmark."""
    metrics = json.loads(file.read_text(encoding="utf-8"))
    benchmarks = metrics.setdefault("benchmarks", {})
    benchmarks[name] = {**benchmarks.get(name, {}), **entry}
    write_json(file, metrics)
    return dict(benchmarks[name])
