"""Resolve and download Hugging Face Hub repositories to local directories."""

import difflib
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from packaging.version import InvalidVersion, Version
from tqdm import tqdm

from wallx_jax.utils.errors import one_line

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
# Files fetched from a model repository: weights, configs, tokenizer and processor files. No pickles.
MODEL_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?", re.ASCII)
RUNS = "runs"  # default output directory of our commands
DOWNLOADS = 8  # concurrent file downloads


def resolve(
    path_or_repo: str | Path,
    kind: Kind = "model",
    revision: str | None = None,
    patterns: list[str] | None = None,
) -> Path:
    """Return the local directory of a model or dataset, downloading it if necessary.

    An existing directory is returned as is; `revision` and `patterns` apply only to the Hub. Otherwise a name that
    `may_be_repo` accepts as a repo id is downloaded, or taken from the Hub cache if there is no network.

    Args:
        path_or_repo: local directory or repo id.
        kind: kind of Hub repository.
        revision: branch, tag or commit on the Hub.
        patterns: glob patterns of the files to fetch; None: all files of a dataset, `MODEL_PATTERNS` of a model.

    Raises:
        FileNotFoundError: not found; one line with what was looked for, where, why it failed, and the remedy.
        OSError: the Hub cache cannot be written.
    """
    name = str(path_or_repo)
    path = Path(name).expanduser()
    if name and path.is_dir():  # Path("") is the working directory
        return path
    if path.is_file():
        raise FileNotFoundError(f"{kind} {name!r} is a file; give the folder that contains it")
    if not may_be_repo(name, kind):
        raise FileNotFoundError(f"{kind} folder {name!r} does not exist{_hint(name, path, kind)}")

    import huggingface_hub  # imported here because it is slow, and local directories do not need it

    if patterns is None and kind == "model":
        patterns = list(MODEL_PATTERNS)
    try:
        found = huggingface_hub.snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns)
    except Exception as error:  # a dozen exception types from two HTTP libraries, each with a page-long traceback
        raise _unwritable_cache(error) or _not_found(name, kind, revision, error) from None
    return Path(found)


def may_be_repo(name: str, kind: Kind) -> bool:
    """Return whether a name may be a Hub repo id: "name" or "owner/name".

    A path into an existing local directory is a repo id only if the Hub cache has that repository. `runs/NAME`, where
    our commands write, never is.
    """
    if not REPO_ID.fullmatch(name):
        return False
    owner, _, rest = name.partition("/")
    if not rest:
        return True
    return owner != RUNS and (not Path(owner).exists() or _cache_folder(name, kind).is_dir())


def _hint(name: str, path: Path, kind: Kind) -> str:
    """Return a hint for a path that does not exist: its nearest existing parent, and similar names there."""
    if "://" in name:
        return ": write a repository of the hub as OWNER/NAME"
    if not name:
        return ""
    nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(nearest).parts[0]
    try:
        names = [child.name for child in nearest.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(missing, names, 1, cutoff=0.65)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    hint = f": {nearest} has no {missing!r}{meant}"
    if REPO_ID.fullmatch(name) and not name.startswith(f"{RUNS}/"):
        hint += f"; if the hub's repository is meant, fetch it first: {_fetch_command(name, kind)}"
    return hint


def _fetch_command(name: str, kind: Kind, revision: str | None = None) -> str:
    """Return the command that downloads a repository to the Hub cache."""
    what = " --repo-type dataset" if kind == "dataset" else ""
    return f"hf download {name}{what}{f' --revision {revision}' if revision else ''}"


def _cache_folder(repo_id: str, kind: Kind) -> Path:
    """Return the directory of a repository in the Hub cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo_id.replace('/', '--')}"


def fetch_files(repo_id: str, kind: Kind, commit: str, names: Sequence[str]) -> None:
    """Fetch files of a repository to the Hub cache with a progress bar; an interrupted download resumes.

    Args:
        repo_id: repository on the Hub.
        kind: kind of repository.
        commit: the commit whose snapshot the files belong to.
        names: paths in the repository.

    Raises:
        FileNotFoundError: a file cannot be fetched; one line that names the first such file and the cause.
        OSError: the Hub cache cannot be written.
    """
    import huggingface_hub

    def fetch(name: str) -> None:
        try:
            huggingface_hub.hf_hub_download(repo_id, name, repo_type=kind, revision=commit)
        except Exception as error:
            raise _unwritable_cache(error) or FileNotFoundError(
                f"{name} of {kind} {repo_id!r} (revision {commit}) could not be fetched ({_reason(error)}); what has "
                "arrived is kept: try again"
            ) from None

    with tqdm(total=len(names), desc=f"fetching {repo_id}", unit="file") as bar, ThreadPoolExecutor(DOWNLOADS) as pool:
        try:
            for _ in pool.map(fetch, names):
                bar.update()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def newest_version(repo_id: str, kind: Kind, newest: Version) -> str | None:
    """Return the git tag (or branch) of the newest readable version: same major version as `newest`, and no newer.

    Without a network, the refs in the Hub cache are used.

    Returns:
        The tag, such as "v3.0"; None if no tag is a version.

    Raises:
        FileNotFoundError: there is no such repository, or none of its versions can be read; the message lists them.
    """
    versions = {}
    for name in _refs(repo_id, kind):
        try:
            versions[Version(name)] = name
        except InvalidVersion:
            continue
    if not versions:
        return None
    listed = ", ".join(versions[version] for version in sorted(versions))
    readable = [version for version in versions if version.major == newest.major and version <= newest]
    if not readable:
        raise FileNotFoundError(
            f"{kind} {repo_id!r} has the versions {listed}, none of them v{newest.major}.x up to v{newest}, which this "
            "package reads; convert it, or name a branch, tag or commit as its revision"
        )
    chosen = versions[max(readable)]
    logger.info("%s: revision %s of %s", repo_id, chosen, listed)
    return chosen


def _refs(repo_id: str, kind: Kind) -> list[str]:
    """Return the names of a repository's branches and tags, from the Hub or, failing that, from its cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(repo_id, repo_type=kind)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    except errors.RepositoryNotFoundError as error:  # raised for gated repositories too
        raise _not_found(repo_id, kind, None, error) from None
    except Exception:  # no network; the exception type depends on the HTTP library
        folder = _cache_folder(repo_id, kind) / "refs"
        return [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]


def _not_found(name: str, kind: Kind, revision: str | None, error: Exception) -> FileNotFoundError:
    from huggingface_hub import constants

    return FileNotFoundError(
        f"{kind} {name!r} (revision {revision or 'main'}) is neither a folder here nor in the hub's cache "
        f"{constants.HF_HUB_CACHE}, and could not be fetched from {constants.ENDPOINT} ({_reason(error)}); "
        f"give the path of a folder that contains it, or fill the cache: {_fetch_command(name, kind, revision)}"
    )


def _unwritable_cache(error: BaseException | None) -> OSError | None:
    """Return the error to raise if a fetch failed on a local file, which can only be in the Hub cache; else None."""
    from huggingface_hub import constants

    while error is not None:
        if isinstance(error, OSError) and error.filename is not None:
            return OSError(
                f"the hub's cache {constants.HF_HOME} cannot be written ({error.strerror}: {error.filename}); set "
                "HF_HOME to a folder that can"
            )
        error = error.__cause__ or error.__context__
    return None


def _reason(error: Exception) -> str:
    """Describe the common causes of a failed fetch; for any other, return the client's own message, shortened."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its terms on the hub and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or it is private and you are not logged in"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "no such file"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError) and not isinstance(cause, errors.LocalEntryNotFoundError):
            return _reason(cause)
        return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no network"
    return f"{type(error).__name__}: {one_line(error)}"
