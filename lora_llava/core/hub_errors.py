"""Why the Hub did not give a repository, in one line that names the fix."""

from __future__ import annotations

_HUB = "https://huggingface.co"


def hub_problem(error: BaseException, repository: str, *, dataset: bool = False) -> str:
    """Return why a repository could not be had.

    Args:
        error: What huggingface_hub raised.
        repository: The repository's id.
        dataset: Whether it is a data set, rather than a model.

    Returns:
        A text to follow a colon. For a gated repository, one whose licence has to be accepted, it says how.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = [each for each in (error, error.__cause__) if each is not None]
    if any(isinstance(each, GatedRepoError) for each in causes):  # it is a RepositoryNotFoundError, too
        page = f"{_HUB}/{'datasets/' if dataset else ''}{repository}"
        return f"it is gated; accept its licence on {page}, log in with `hf auth login`, and start again"
    if any(isinstance(each, RepositoryNotFoundError) for each in causes):
        return "there is none of this name, or it is private; correct the name, or log in with `hf auth login`"
    return next(iter(str(error).splitlines()), type(error).__name__)
