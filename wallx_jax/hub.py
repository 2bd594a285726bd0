"""Local folder or Hugging Face hub repository: one function that gives a folder."""

import re
from pathlib import Path
from typing import Literal

# Of a model repository: weights, configs, tokenizer and processor files. No pickles.
MODEL_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?", re.ASCII)


def resolve(
    path_or_repo: str | Path,
    kind: Literal["model", "dataset"] = "model",
    revision: str | None = None,
    patterns: list[str] | None = None,
) -> Path:
    """The folder of a model or dataset.

    A folder that exists is taken as it is (`revision` and `patterns` are the hub's business). Otherwise a string that
    looks like a repo id ("name" or "owner/name") is downloaded, or taken from the hub's cache when there is no network.

    Args:
        kind: which kind of hub repository to look for.
        revision: branch, tag or commit on the hub.
        patterns: files to fetch, with wildcards; by default all of a dataset and `MODEL_PATTERNS` of a model.

    Raises:
        FileNotFoundError: in one line: what was looked for, where, why it failed, and where to put it.
    """
    name = str(path_or_repo)
    path = Path(name).expanduser()
    if name and path.is_dir():  # Path("") would be the working directory
        return path
    if path.is_file():
        raise FileNotFoundError(f"{kind} {name!r} is a file; give the folder that holds it")
    if not REPO_ID.fullmatch(name):
        raise FileNotFoundError(f"{kind} folder {name!r} does not exist")

    import huggingface_hub  # here, so that local folders need not wait for it
    from huggingface_hub import constants

    if patterns is None and kind == "model":
        patterns = list(MODEL_PATTERNS)
    try:
        found = huggingface_hub.snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns)
    except Exception as error:  # a dozen kinds, from two HTTP libraries, each with a page of traceback
        raise FileNotFoundError(
            f"{kind} {name!r} (revision {revision or 'main'}) is neither a folder here nor in the hub's cache "
            f"{constants.HF_HUB_CACHE}, and could not be fetched from {constants.ENDPOINT} ({_reason(error)}); "
            f"give the path of a folder that holds it, or fill the cache: hf download {name}"
            f"{' --repo-type dataset' if kind == 'dataset' else ''}{f' --revision {revision}' if revision else ''}"
        ) from None
    return Path(found)


def _reason(error: Exception) -> str:
    """Which of the usual reasons it was; an unusual one in the client's own first line."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its terms on the hub and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or it is private and you are not logged in"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError) and not isinstance(cause, errors.LocalEntryNotFoundError):
            return _reason(cause)
        return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no network"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
