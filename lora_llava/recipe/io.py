"""Load recipes from YAML 1.2, apply overrides, write them back, and write their JSON Schema."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lora_llava.core.errors import UserError, nearest
from lora_llava.core.secrets import find_secrets
from lora_llava.core.storage import looked_in
from lora_llava.recipe.context_sources import replace_sources
from lora_llava.recipe.continued import fill_from_run, lacks_values
from lora_llava.recipe.generate_schema import GenerateRecipe
from lora_llava.recipe.mistakes import suggest_key, suggest_value
from lora_llava.recipe.places import as_written, find_inputs
from lora_llava.recipe.schema import Recipe

Schema = TypeVar("Schema", bound=BaseModel)
_LARGEST = 1_000_000
"""Most bytes of a recipe, and most characters with its aliases expanded; shipped recipes have a few thousand."""
_BRANCHES = ("bool", "int", "float", "str")
"""Names of a union's branches in the places that pydantic gives."""
_WORDS = {
    "tuple_type": "a list",
    "model_type": "a section with keys",
    "string_pattern_mismatch": 'a text such as "30 min"',
}
"""Our words for some kinds of errors, by pydantic's type."""
_HINTED = 8
"""Most wrong values for which a message names what was meant; each is validated several times."""

RECIPE_FILE = "recipe.yaml"
"""The recipe in a run directory."""
RENAMED_KEYS = {"samples_per_picture": "samples_per_image"}
"""Top-level keys by their earlier names, which are still accepted with a warning."""


class RecipeError(UserError):
    """A recipe that cannot be used."""


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML 1.2 document: `2e-5` is a number, `no` a string, and a repeated key an error.

    Args:
        text: The document.
        where: The file or field, for messages.

    Returns:
        Plain dicts, lists, strings, numbers, booleans and None.

    Raises:
        RecipeError: For text that is not YAML, a duplicate key, or aliases that expand to more than the limit.
    """
    try:
        yaml = YAML(typ="safe", pure=True)
        if "*" in text and _expands_too_far(yaml.compose(text)):
            raise RecipeError(f"{where}: its aliases expand to more than {_LARGEST:,} characters; write the values out")
        return yaml.load(text)
    except RecipeError:
        raise
    except DuplicateKeyError as error:
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else error.problem
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: the key {key} appears twice; keep one") from None
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: not YAML: {error.problem}") from None
    except YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not readable as YAML: it is nested too deeply") from None
    except Exception as error:  # ruamel's constructors raise anything for a text that does not fit its tag
        raise RecipeError(f"{where}: not YAML: {_short(str(error).partition(';')[0])}") from None


def _expands_too_far(root: Any) -> bool:
    """Check whether nodes with their aliases expanded exceed the size limit, before anything is constructed."""
    size, waiting = 0, [root]
    while waiting and size <= _LARGEST:
        value = getattr(waiting.pop(), "value", None)
        size += 1 + (len(value) if isinstance(value, str) else 0)
        for child in value if isinstance(value, list) else ():
            waiting.extend(child if isinstance(child, tuple) else (child,))
    return size > _LARGEST


def _short(text: str) -> str:
    """Shorten a text for a message of one line."""
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load the recipe of a training run and apply overrides.

    Args:
        path: A YAML file.
        overrides: Texts `key.sub=value`; the value is parsed as YAML.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: For a missing file, bad YAML, an unknown key, a wrong type or a value out of range.
    """
    content, where = _read_content(path, overrides)
    if "teacher" in content and "stage" not in content:
        raise RecipeError(f"{where} generates data; run it with lora-llava generate-data")
    return _completed(_with_inputs(check_recipe(content, where), Path(where)), where)


def _completed(recipe: Recipe, where: str) -> Recipe:
    """Fill what a recipe that continues a run leaves out.

    Raises:
        RecipeError: If the run's recipe cannot be read, or the filled recipe has values that do not fit.
    """
    run = recipe.model.start_from.run
    if run is None or not lacks_values(recipe):
        return recipe
    file = Path(run) / RECIPE_FILE
    if not file.is_file():
        if recipe.lora is None:
            what = f"{run} has no {RECIPE_FILE}" if Path(run).is_dir() else f"the folder {run} does not exist"
            raise RecipeError(f"{where}: model.start_from.run: {what}{looked_in(run)}; name a run directory")
        return recipe
    filled = fill_from_run(recipe, load_recipe(file))
    check_recipe(filled.model_dump(mode="json"), where)
    return filled


def load_generate_recipe(path: str | Path, overrides: Iterable[str] = ()) -> GenerateRecipe:
    """Load a recipe of `lora-llava generate-data`; arguments and errors are those of `load_recipe`. See also
    `replace_sources`."""
    content, where = _read_content(path, overrides, replace_sources)
    if "stage" in content and "teacher" not in content:
        raise RecipeError(f"{where} trains a model; run it with lora-llava finetune")
    return _with_inputs(_check(GenerateRecipe, content, where), Path(where))


def _with_inputs(recipe: Schema, file: Path) -> Schema:
    try:
        return find_inputs(recipe, file.parent)
    except UserError as error:
        raise RecipeError(f"{file}: {error}") from None


def _read_content(
    path: str | Path,
    overrides: Iterable[str],
    prepare: Callable[[dict[str, Any], Sequence[str]], None] = lambda content, overrides: None,
) -> tuple[dict[str, Any], str]:
    path = find_recipe(path)
    if (size := path.stat().st_size) > _LARGEST:
        raise RecipeError(f"{path}: the file has {size:,} bytes, and a recipe at most {_LARGEST:,}; name a recipe")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error}") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of keys, not a {type(content).__name__}; start from a shipped recipe"
        )
    _rename_keys(content, str(path))
    prepare(content, overrides := list(overrides))
    for override in overrides:
        key, equals, value = override.partition("=")
        _apply_override(content, _new_name(key, f"override {override!r}") + equals + value)
    return content, str(path)


def _rename_keys(content: dict[str, Any], where: str) -> None:
    """Give top-level keys with an old name their new one, with a warning.

    Raises:
        RecipeError: If both names are present.
    """
    for old in RENAMED_KEYS.keys() & content.keys():
        if RENAMED_KEYS[old] in content:
            raise RecipeError(f"{where}: {old} is the old name of {RENAMED_KEYS[old]}; keep one of the two")
        content[_new_name(old, where)] = content.pop(old)


def _new_name(key: str, where: str) -> str:
    """Return the present name of a key; print a warning if it has another name now."""
    if key in RENAMED_KEYS:
        print(f"warning: {where}: {key} is now called {RENAMED_KEYS[key]}; use the new name", file=sys.stderr)
    return RENAMED_KEYS.get(key, key)


def override_recipe(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """Return a recipe with `key.sub=value` overrides applied.

    Raises:
        RecipeError: For an unknown key, a wrong type or a value out of range.
    """
    overrides = list(overrides)
    if not overrides:
        return recipe
    content = recipe.model_dump(mode="json", exclude_unset=True)  # a run that it continues gives what it leaves out
    for override in overrides:
        _apply_override(content, override)
    return _completed(check_recipe(content, "recipe"), "recipe")


def check_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    """Validate a recipe's plain content and report all errors, one line each.

    Raises:
        RecipeError: If fields are wrong; the message names all of them.
    """
    return _check(Recipe, content, where)


def _check(schema: type[Schema], content: Mapping[str, Any], where: str) -> Schema:
    secrets = [
        f"{where}: {_short(field)} holds {what}; remove it, a run saves a copy of its recipe"
        for field, what in find_secrets(content)
    ]
    if secrets:  # before any message quotes a value
        raise RecipeError("\n".join(secrets))
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        lines: dict[str, str] = {}
        wrong: dict[str, tuple[int | str, ...]] = {}
        for detail in error.errors():
            if detail["type"] == "too_short" and detail["input"]:
                continue  # pydantic counts only valid items; the errors of the others are reported
            field, line = _explain(schema, detail)
            lines[field] = f"{lines[field]} or {line.split('it should be ')[-1]}" if field in lines else line
            if "; it should be " in line:
                wrong[field] = detail["loc"]
        for field in list(wrong)[:_HINTED]:
            lines[field] += suggest_value(schema, content, wrong[field])
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines.values())) from None


def _explain(schema: type[BaseModel], detail: Any) -> tuple[str, str]:
    """Return the field and the message about it."""
    # In a union pydantic also names the branch, such as `constrained-int` or `literal['all']`.
    *outer, own = map(str, detail["loc"] or [""])
    location = [part for part in outer if not re.search(r"[\[-]", part)]
    is_branch = own in _BRANCHES or re.search(r"[\[-]", own)
    if own and (detail["type"] == "extra_forbidden" or not is_branch):  # a key from the recipe
        location.append(own)
    field = _short(".".join(location)) or "recipe"
    if detail["type"] == "extra_forbidden" and not own:
        return f"{field}.", f"{field}: a key in it is empty; name it or remove it"
    if detail["type"] == "extra_forbidden":
        return field, f"{field} is not a key of a recipe{suggest_key(schema, tuple(location), detail['input'])}"
    if detail["type"] == "invalid_key":
        return field, f"the key {field} is not text; write it in quotes"
    if detail["type"] == "missing":
        return field, f"{field} is missing"
    if detail["type"] == "too_short":
        return field, f"{field} is {_short(repr(detail['input']))}; name at least one"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = _WORDS.get(detail["type"], message)
    if detail["type"] == "value_error":
        return field, f"{field}: {message}" if location else message
    return field, f"{field} is {_short(repr(detail['input']))}; it should be {message}"


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise RecipeError(f"override {override!r}: write key.sub=value")
    target: Any = content
    for part in parts[:-1]:
        if isinstance(target, list):
            target = target[int(part)] if part.isdigit() and int(part) < len(target) else None
        else:
            target = target.setdefault(part, {})
        if not isinstance(target, dict) and not (isinstance(target, list) and part != parts[-2]):
            raise RecipeError(f"override {override!r}: {part} is not a section")
    target[parts[-1]] = parse_yaml(value, f"override {override!r}")


def dump_recipe(recipe: BaseModel) -> str:
    """Return the resolved recipe with its defaults as YAML, from which an equal recipe is loaded."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = False  # U+0085 written bare would read back as a space
    yaml.width = sys.maxsize  # a wrapped line loses spaces beside escapes
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(json.loads(recipe.model_dump_json()), stream)
    return stream.getvalue()


LATER_KEYS: dict[str, Any] = {
    "model.new_tokens": [],
    "model.start_from.run": None,
    "lora.vision": None,
    "lora.modules_to_save": [],
    "lora.init": "default",
    "model.high_resolution": None,
    "model.max_tiles": None,
    "training.loraplus_ratio": None,
    "training.early_stopping": None,
    "training.deterministic": False,
    "training.share_images": "auto",
    "training.questions_per_image": 10,
    "evaluation.shuffled": 0.25,
    "gates.max_ungrounded": 0.7,
    "teacher.reconnect": 600.0,
}
"""Keys that earlier versions did not have, with their defaults: at those a recipe is the same as without the key."""


def recipe_hash(recipe: BaseModel) -> str:
    """Return the SHA-256 of a recipe without its output directory, with its paths as written."""
    content = as_written(recipe, recipe.model_dump(mode="json", exclude={"output_dir"}))
    for key, default in LATER_KEYS.items():
        *path, field = key.split(".")
        section: Any = content
        for name in path:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and field in section and section[field] == default:
            section.pop(field)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


SCHEMAS: dict[str, type[BaseModel]] = {"schema.json": Recipe, "generate_schema.json": GenerateRecipe}
"""Schemas by the file, beside the shipped recipes, that holds them."""


def json_schema(name: str = "schema.json") -> str:
    """Return the JSON Schema of a recipe, as in `recipes/schema.json` and `recipes/generate_schema.json`."""
    return json.dumps(SCHEMAS[name].model_json_schema(), indent=2) + "\n"


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[Path]:
    """Return the shipped recipes of training runs, sorted by name."""
    return [file for file in _shipped() if "\nteacher:" not in file.read_text(encoding="utf-8")]


def shipped_generate_recipes() -> list[Path]:
    """Return the shipped recipes of `lora-llava generate-data`, sorted by name."""
    return [file for file in _shipped() if file not in shipped_recipes()]


def _shipped() -> list[Path]:
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(path: str | Path) -> Path:
    """Find a recipe by path, or else by name among the shipped ones.

    Raises:
        RecipeError: If none exists.
    """
    looked, path = looked_in(path), Path(os.path.expanduser(path))
    if path.is_file():
        return path
    shipped = recipes_folder() / path.name
    if shipped.is_file() and path.parent.name in ("", "recipes"):
        return shipped
    names = [recipe.name for recipe in _shipped()]
    raise RecipeError(f"{path}: no such recipe{looked}{nearest(path.name, names)}")


def copy_recipes(folder: Path) -> list[Path]:
    """Copy the shipped recipes and their schemas to a folder; existing files are not overwritten.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for source in [*_shipped(), *(recipes_folder() / name for name in SCHEMAS)]:
        target = folder / source.name
        if not target.exists():
            shutil.copyfile(source, target)
            written.append(target)
    return written
