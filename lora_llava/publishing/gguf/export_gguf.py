"""Export a LLaVA as GGUF: the language model, the mmproj, and a Modelfile."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.core.progress import progress_bar
from lora_llava.core.storage import full_disk_reported
from lora_llava.publishing.gguf.gguf_file import Typed, check_gguf, file_bytes, write_gguf
from lora_llava.publishing.gguf.gguf_source import GgufSource, read_gguf_source
from lora_llava.publishing.gguf.gguf_template import modelfile, read_template, template_for_llama
from lora_llava.publishing.gguf.gguf_types import Quant, check_quantizer, file_type, tensor_type
from lora_llava.publishing.gguf.gguf_vocabulary import GgufVocabulary, add_vocabulary, read_gguf_vocabulary
from lora_llava.publishing.gguf.mmproj import ClassToken, add_mmproj_metadata, check_mmproj, mmproj_tensors
from lora_llava.publishing.gguf.text_model import add_text_metadata, context_length, gguf_family, text_tensors
from lora_llava.publishing.new_folder import check_disk, check_new, new_folder

MODEL_FILE, MMPROJ_FILE, MODELFILE = "model-{}.gguf", "mmproj-f16.gguf", "Modelfile"


def export_gguf(
    folder: Path,
    output: Path,
    *,
    quant: Quant = "f16",
    class_token: ClassToken = "none",
    square_images: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Write `model-QUANT.gguf`, `mmproj-f16.gguf` and a Modelfile; the folder appears when all are complete.

    Args:
        folder: A run directory, or a merged folder.
        output: The new folder, which must not exist.
        quant: Type of the language model's matrices; tower and projector are always float16.
        class_token: Where llama.cpp puts CLIP's class token; see `mmproj_tensors`.
        square_images: Whether only square images will be sent, so that a model trained on crops is served equally.
        console: Prints what was written and how to serve it.

    Returns:
        Names and bytes of the files, and the number of tensors of each type.

    Raises:
        UserError: For a model that llama.cpp does not compute equally, or too little disk space.
    """
    check_gguf()
    check_new(output)
    check_quantizer(quant, output)
    source = read_gguf_source(folder)
    family = gguf_family(source.config.text_config)
    check_mmproj(source, square_images)
    vocabulary = read_gguf_vocabulary(source)
    template = read_template(source.folder)
    text, mmproj = (
        _typed(source, text_tensors(source, family), quant),
        _typed(source, mmproj_tensors(source, class_token), "f16"),
    )
    total = file_bytes(text) + file_bytes(mmproj)
    check_disk(output, total)
    bos = vocabulary.tokens[vocabulary.ids["bos"]] if "bos" in vocabulary.ids else None
    name, model_file = folder.resolve().name, MODEL_FILE.format(quant)

    def describe(writer: Any) -> None:
        add_text_metadata(writer, source.config.text_config, name)
        writer.add_file_type(file_type(quant))
        writer.add_quantization_version(2)
        add_vocabulary(writer, vocabulary, template_for_llama(template, vocabulary, bos))

    def describe_mmproj(writer: Any) -> None:
        add_mmproj_metadata(writer, source, name)
        writer.add_file_type(file_type("f16"))

    content = modelfile(template, bos, (model_file, MMPROJ_FILE), _stop_texts(vocabulary))
    with (
        new_folder(output) as temporary,
        full_disk_reported(output.parent, "free some space, or choose another --output"),
    ):
        with progress_bar(total=total, desc="exporting", unit="B", unit_scale=True) as bar:
            write_gguf(temporary / model_file, family.arch, text, describe, bar.update)
            write_gguf(temporary / MMPROJ_FILE, "clip", mmproj, describe_mmproj, bar.update)
        (temporary / MODELFILE).write_text(content, encoding="utf-8")
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
    report = {"files": sizes, "types": _counts(text), "tokenizer": vocabulary.kind}
    _print(report, output, model_file, source, vocabulary, class_token, console)
    return report


def _typed(source: GgufSource, tensors: list[Any], quant: Quant) -> list[Typed]:
    layers = source.config.text_config.num_hidden_layers
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    return [(tensor, tensor_type(tensor.name, tensor.shape, quant, layers, tied)) for tensor in tensors]


def _counts(tensors: list[Typed]) -> dict[str, int]:
    """Return the number of matrices of each type."""
    counts: dict[str, int] = {}
    for tensor, kind in tensors:
        if len(tensor.shape) > 1:
            counts[kind.name] = counts.get(kind.name, 0) + 1
    return counts


def _stop_texts(vocabulary: GgufVocabulary) -> list[str]:
    ends = [vocabulary.tokens[vocabulary.ids[name]] for name in ("eos", "eot", "eom") if name in vocabulary.ids]
    return [*ends, *vocabulary.stops]


def _print(
    report: dict[str, Any],
    output: Path,
    model: str,
    source: GgufSource,
    vocabulary: GgufVocabulary,
    class_token: str,
    console: Console,
) -> None:
    def line(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    for name, size in report["files"].items():
        line(f"written: {output / name}, {size / 1e6:,.1f} MB" if size >= 1e5 else f"written: {output / name}")
    line("matrices of the language model: " + ", ".join(f"{n} {kind}" for kind, n in report["types"].items()))
    if vocabulary.kind == "gemma4":
        line(
            "the tokenizer's merges do not come from a SentencePiece model: written as a list, which needs llama.cpp "
            "b8672 of April 2026 or later; an older one stops with \"unknown tokenizer: 'gemma4'\": update it"
        )
    if class_token == "none":
        line("the tower's class token is left out, since llama.cpp misplaces it: its issue 25814, and --class-token")
    if vocabulary.stops:
        texts = ", ".join(map(repr, vocabulary.stops))
        line(f"answers end at the text {texts}, which GGUF cannot carry: send it as `stop` in each request")
    context = context_length(source.config.text_config)
    line("serve it with llama.cpp:")
    files = [shlex.quote(str(output / each)) for each in (model, MMPROJ_FILE)]
    line(f"  llama-server -m {files[0]} --mmproj {files[1]} -c {context} --jinja --temp 0")
