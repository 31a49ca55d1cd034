"""`lora-llava push`: upload a run or a model folder to the Hub in one commit; repeating it uploads nothing."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_llava.core.errors import ReportedError, UserError
from lora_llava.core.storage import file_hash
from lora_llava.model.provenance import locate_base
from lora_llava.model.start import RUN_FILE
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.model.weights.tensor_files import weight_files
from lora_llava.publishing.card.model_card import add_card
from lora_llava.publishing.merge import BASE_FILE
from lora_llava.publishing.package import CARD_FILE, Package, check_complete, check_secrets, collect, is_pushed_file
from lora_llava.runs.check_run import check_run
from lora_llava.runs.directory import is_run, read_record

_HUB_FILES = (".gitattributes",)
"""Files that the Hub itself adds."""
_CONNECTION_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__  # type: ignore[assignment]
"""OSError, and the HTTPError of httpx or httpx2, whichever huggingface_hub uses."""
_FAILURES: tuple[type[Exception], ...] = (*_CONNECTION_ERRORS, RuntimeError)
"""RuntimeError is "Error while uploading X", with the real error as its cause."""


class PushError(ReportedError):
    """The Hub rejected the upload, or the connection failed."""


def push(
    folder: Path,
    repo_id: str,
    *,
    public: bool = False,
    base_repo: str | None = None,
    replace: bool = False,
    licence: str | None = None,
    dry_run: bool = False,
    console: Console,
) -> str | None:
    """Push a run or a model folder to the Hub.

    Args:
        folder: A run directory, a merged folder or a base folder.
        repo_id: The repository, `owner/name`.
        public: Make a new repository public; an existing one keeps its visibility.
        base_repo: Repository for a run's local base, which is pushed before the adapter that names it.
        replace: Replace another model in the repository; a base is never replaced.
        licence: Licence identifier for the card.
        dry_run: Print the files and the card, and upload nothing.
        console: Prints progress and result.

    Returns:
        The commit, or None for a dry run.

    Raises:
        UserError: For an unsuitable folder, name, token or repository, or a secret in a file.
        PushError: If the Hub rejects the upload or cannot be reached.
    """
    for name in (repo_id, base_repo):
        _check_repo_id(name)
    if repo_id == base_repo:
        raise UserError(f"--base-repo: {base_repo} is the adapter's own repository; choose another for its base")
    base = _base_package(folder, base_repo, licence)
    package = _package(folder, repo_id, licence, base_repo)
    for each in (base, package):
        if each is not None:
            check_secrets(each)
            check_complete(each)
    if dry_run:
        for each, name in ((base, base_repo), (package, repo_id)):
            if each is not None and name is not None:
                _print_package(each, name, public, console)
        console.print("dry run: nothing was uploaded")
        return None
    api = _connect()
    commit = None
    if base is not None and base_repo is not None:
        with _hub_errors(repo_id):  # check before the base is uploaded for an adapter that would be rejected
            _stale(api, package, repo_id, _remote_files(api, repo_id) or [], replace)
        commit = _upload(api, base, base_repo, public, False, console)
        package = _package(folder, repo_id, licence, base_repo, commit)
    return _upload(api, package, repo_id, public, replace, console)


def _check_repo_id(name: str | None) -> None:
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name} is not a valid repository name ({str(error).splitlines()[0]})") from None
    if "/" not in name:
        raise UserError(f"{name} lacks an owner; write OWNER/NAME, with your name on the Hub as OWNER")


def _package(
    folder: Path, repo_id: str, licence: str | None, base_repo: str | None, base_commit: str | None = None
) -> Package:
    package = collect(folder, base_repo, base_commit)
    add_card(package, repo_id, licence)
    return package


def _base_package(folder: Path, base_repo: str | None, licence: str | None) -> Package | None:
    """Collect the local base of a run, which is pushed first."""
    if base_repo is None:
        return None
    check_run(folder, "a run")
    if not is_run(folder):
        raise UserError(f"--base-repo: {folder} is a complete model without a base; leave the flag out")
    record = read_record(folder)["base"]
    if record.get("revision"):
        raise UserError(f"--base-repo: the base {record['name']} is on the Hub already; leave the flag out")
    return _package(locate_base(record, folder), base_repo, licence, None)


def _connect() -> HfApi:
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set; unset it to push")
    if get_token() is None:
        raise UserError("no Hub token was found; run `hf auth login`, or set HF_TOKEN to a token with write access")
    return HfApi(library_name="lora_llava")


def _upload(api: HfApi, package: Package, repo_id: str, public: bool, replace: bool, console: Console) -> str:
    with _hub_errors(repo_id):
        there = _remote_files(api, repo_id)
        if there is None:
            url = api.create_repo(repo_id, private=not public, exist_ok=True)
            console.print(f"created {url} ({'public' if public else 'private'})", soft_wrap=True)
            there = []
        stale = _stale(api, package, repo_id, there, replace)
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in sorted(package.files.items())
        ]
        before = api.model_info(repo_id).sha
        commit = api.create_commit(
            repo_id, [*operations, *map(CommitOperationDelete, stale)], commit_message="Upload with lora_llava"
        )
    if commit.oid == before:
        console.print(f"{repo_id} is up to date; nothing was uploaded", soft_wrap=True)
    else:
        console.print(f"pushed {len(operations)} files to {commit.repo_url}", soft_wrap=True)
    kept = [file for file in there if file not in package.files and file not in stale]
    for files, label in ((stale, "removed files of an earlier push"), (kept, "kept other files")):
        if files:
            console.print(f"{label}: {', '.join(files)}", soft_wrap=True)
    return str(commit.oid)


def _remote_files(api: HfApi, repo_id: str) -> list[str] | None:
    """List the files of a repository; None if it does not exist."""
    try:
        return [file for file in api.list_repo_files(repo_id) if file not in _HUB_FILES]
    except RepositoryNotFoundError:
        return None


def _stale(api: HfApi, package: Package, repo_id: str, there: list[str], replace: bool) -> list[str]:
    """List the files of earlier pushes to remove; files that a person added are kept.

    Raises:
        UserError: If the repository has another model, and `replace` is not set.
    """
    stale = [file for file in there if file not in package.files and is_pushed_file(file)]
    if replace or set(there) <= {CARD_FILE} or _same_model(api, package, repo_id, there):
        return stale
    some = ", ".join(sorted(there)[:3]) + (", ..." if len(there) > 3 else "")
    raise UserError(
        f"{repo_id} has another model ({some}; files: {len(there)}); choose another repository, or use --replace to "
        "replace it (the repository's history keeps the old one)"
    )


def _same_model(api: HfApi, package: Package, repo_id: str, there: list[str]) -> bool:
    """Check whether the repository has the same kind of model, from the same recipe and base."""
    kind = "adapter" if ADAPTER_FILE in there else "model" if weight_files(there) else None
    if kind != package.kind:
        return False
    name = BASE_FILE if BASE_FILE in package.files else RUN_FILE
    if name not in there or name not in package.files:
        return _same_weights(api, package, repo_id)
    try:
        theirs = json.loads(Path(api.hf_hub_download(repo_id, name)).read_text(encoding="utf-8"))
        ours = _identity(package.record, name)
        return ours is not None and _identity(theirs, name) == ours
    except (ValueError, AttributeError):  # a foreign file of that name
        return False


def _identity(record: dict[str, Any], name: str) -> tuple[Any, ...] | None:
    """Return what identifies a model: recipe or weights, and the base; None if nothing does."""
    weights = record.get("adapter_sha256") if record.get("recipe_hash") is None else None
    own = (record.get("recipe_hash"), weights, record.get("hashes"), record.get("stage"))
    if name == RUN_FILE and not any(own[:2]):
        return None
    return *own, (record.get("base") or {}).get("hashes")


def _same_weights(api: HfApi, package: Package, repo_id: str) -> bool:
    remote = {item.path: getattr(item, "lfs", None) for item in api.list_repo_tree(repo_id)}
    ours = {name: path for name, path in package.files.items() if name.endswith(".safetensors")}
    return all(
        (there := remote.get(name)) is not None and there.sha256 == file_hash(path)
        for name, path in ours.items()
        if isinstance(path, Path)
    )


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Raise errors of the Hub as one line, and silence its library's warning about empty commits."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except _FAILURES as error:
        cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
        if isinstance(cause, HfHubHTTPError):
            raise PushError(f"{repo_id}: the Hub rejected the upload ({_refusal(cause)}") from None
        if isinstance(cause, OSError) and (cause.filename is not None or cause.errno == errno.ENOSPC):
            raise cause from None  # a local file, not the connection
        what = str(cause).splitlines()[0] if isinstance(cause, RuntimeError) else type(cause).__name__
        raise PushError(
            f"{repo_id}: {constants.ENDPOINT} does not answer, or the connection failed ({what}); run the same command "
            "again to resume"
        ) from None
    finally:
        logger.setLevel(level)


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    fix = "check that the token has write access" if status in (401, 403) else "run the same command again to resume"
    return f"{status}: {str(error).splitlines()[0]}); {fix}"


def _print_package(package: Package, repo_id: str, public: bool, console: Console) -> None:
    """Print files, sizes and the card of an upload."""
    table = Table(title=f"{repo_id} (created as {'public' if public else 'private'} if new)", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name in sorted(package.files):
        table.add_row(name, f"{package.size(name):,}")
    table.add_row("total", f"{sum(map(package.size, package.files)):,}")
    console.print(table)
    left = sorted(file.name for file in package.folder.iterdir() if file.name not in package.files)
    console.print(f"not uploaded: {', '.join(left) or 'nothing'}", soft_wrap=True)
    card = package.files[CARD_FILE]
    console.print(Text(card.decode() if isinstance(card, bytes) else ""), soft_wrap=True)
