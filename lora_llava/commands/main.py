"""The `lora-llava` command: `lora-llava VERB`, where each verb is a module of its name in this package."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from lora_llava import __version__
from lora_llava.core.errors import ReportedError

GROUPS: dict[str, tuple[str, ...]] = {
    "prepare": ("init", "check", "preview", "plan"),
    "train": ("finetune", "sweep", "compare", "report"),
    "use": ("evaluate", "inspect", "score", "chat", "text-loss"),
    "share": ("merge", "verify", "export", "push", "import"),
    "make data": ("generate-data", "filter-captions"),
    "other": ("recipes", "benchmark", "build-demo"),
}
"""The verbs, in the order in which they are needed."""
VERBS = tuple(verb for verbs in GROUPS.values() for verb in verbs)


def verb_module(verb: str) -> ModuleType:
    """Import a verb's module, which has SUMMARY, EXAMPLES, add_arguments and run.

    These modules import heavy libraries inside `run`, so that `--help` and usage errors print immediately.
    """
    name = verb.replace("-", "_")
    return import_module(f"lora_llava.commands.{'import_' if name == 'import' else name}")


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        verb: The verb, set by scripts/VERB.py; None takes it from the first argument.
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code: 0 for success, 1 where a check found errors, 2 for a mistake in a call, recipe or file, 3 for a
        non-finite loss, and 128 plus the signal's number after a signal, so 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if verb is not None:
        argv.insert(0, verb)
    if argv and argv[0].replace("_", "-") in VERBS:  # generate_data, as its file is called
        argv[0] = argv[0].replace("_", "-")
    args = _parse(argv)
    first = os.environ.get("RANK", "0") == "0"  # set by torchrun and accelerate launch: only the first rank prints
    try:
        from rich.console import Console

        width = None if sys.stdout.isatty() else 120
        console = Console(width=width, highlight=False, markup=False, quiet=not first)
        return int(verb_module(args.verb).run(args, console))
    except ReportedError as error:
        prefix = "error: " if error.exit_code == 2 else ""
        print("\n".join(prefix + line for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        return _report_os_error(error)
    except (RuntimeError, MemoryError) as error:
        return _report_full_memory(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that prints the default of each flag and leaves examples unwrapped."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        is_value = isinstance(default, str | int | float) and not isinstance(default, bool)
        if not text or not is_value or default == argparse.SUPPRESS or "default" in text:
            return text
        return f"{text}; default: {default:g}" if isinstance(default, float) else f"{text}; default: {default}"


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the flag that was probably meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = [match for word in unknown for match in difflib.get_close_matches(word.partition("=")[0], flags, 1)]
        super().error(f"{message}; did you mean {near[0]}?" if near else message)


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of one verb; only that verb's module is imported."""
    parser = _Parser(
        prog="lora-llava",
        usage="lora-llava [-h] [--version] VERB ...",
        description="Fine-tune LLaVA with LoRA and QLoRA.",
        epilog="Run `lora-llava VERB --help` for the arguments of a verb.",
    )
    parser.add_argument(
        "--version", action="version", version=f"lora-llava {__version__}", help="print the version and exit"
    )
    if not argv or argv[0] in ("-h", "--help"):
        parser.epilog = f"{_overview()}\n\n{parser.epilog}"
    verb = argv[0] if argv else None
    if verb is None or verb.startswith("-"):
        parser.parse_args(argv)
        parser.error("a verb is missing; `lora-llava --help` lists them")
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        parser.error(f"no verb {verb!r}" + (f"; did you mean {near[0]}?" if near else f"; verbs: {', '.join(VERBS)}"))
    module = verb_module(verb)
    examples = "\n".join(f"  {example}" for example in module.EXAMPLES)
    parser = _Parser(
        prog=f"lora-llava {verb}",
        description=module.SUMMARY,
        epilog=f"examples:\n{examples}",
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args, rest = parser.parse_known_args(argv[1:])
    if hasattr(args, "overrides"):  # argparse does not collect overrides that follow an option
        args.overrides = [*args.overrides, *(text for text in rest if "=" in text and not text.startswith("-"))]
        rest = [text for text in rest if text not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.verb = verb
    return args


def _overview() -> str:
    """List the verbs by group, each with its summary and an example."""
    lines = []
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:"]
        for verb in verbs:
            module: Any = verb_module(verb)
            lines += [f"  {verb:16} {module.SUMMARY}", f"  {'':16}   {module.EXAMPLES[0]}"]
    return "\n".join(lines[1:])


def _report_full_memory(error: RuntimeError | MemoryError) -> int:
    """Report full memory, of the GPU or of the machine; raise any other error again."""
    from lora_llava.core.device import first_sentence, is_out_of_memory

    if not is_out_of_memory(error):
        raise error
    print(
        f"error: memory is full ({first_sentence(error)}); stop other programs that use it (nvidia-smi names those on "
        "a GPU), or use a smaller model, or model.quantization=nf4",
        file=sys.stderr,
    )
    return 2


def _report_os_error(error: OSError) -> int:
    """Print one line about a path or a full disk, and return the exit code.

    Raises:
        OSError: The error itself, if it has another cause.
    """
    about_a_path = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
    if isinstance(error, about_a_path) or error.errno == errno.EROFS:
        print(f"error: {error.filename}: {error.strerror}; choose another path", file=sys.stderr)
        return 2
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    print("error: the disk is full; free some space, then run the same command again", file=sys.stderr)
    return 1


def console_main() -> None:
    """Run the `lora-llava` command."""
    sys.exit(main())


if __name__ == "__main__":
    console_main()
