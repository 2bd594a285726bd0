"""Write files and directories atomically, and read small files with errors that name the damage."""

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs"  # in place of the file in a clone without Git LFS

# Remedies for failed writes, by errno.
DISK_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or use another file system",
    errno.EROFS: "make it writable again",
    errno.EACCES: "make it writable again",
    errno.EPERM: "make it writable again",
}


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is the stub that Git LFS leaves until the content is fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read_text(path: Path) -> str:
    """Read a small text file as UTF-8, regardless of the locale. A byte order mark is skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, a Git LFS pointer or not UTF-8; the message names it.
    """
    data = path.read_bytes()
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file; fetch it with `git lfs pull`")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, or copy it again") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; copy it again")
    return text


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file that contains an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as in `read_text`; or the file is truncated, has a duplicate key or is not a JSON object.
    """
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        is_cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        what = "it is cut off" if is_cut_off else f"unexpected text at column {error.colno}"
        raise ValueError(f"{path} is not valid JSON (line {error.lineno}: {what}); copy it again") from None
    except (ValueError, RecursionError) as error:  # ValueError: from the hook, or a huge integer
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is malformed ({what}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a JSON {_JSON_TYPES[type(content)]}; expected an object, copy it again")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from pairs with unique keys: an `object_pairs_hook` for json.loads, which keeps the last duplicate.

    Raises:
        ValueError: a key occurs more than once.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return content


_JSON_TYPES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def unusable_folder(path: str | Path) -> str | None:
    """Return why files cannot be written to the directory `path`, which need not exist yet; None if they can.

    Tested by creating a temporary directory in `path` or, if it does not exist, in its nearest existing parent.
    """
    path = Path(path).expanduser().absolute()
    try:
        existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        if not existing.is_dir():
            kind = "a broken link" if existing.is_symlink() and not existing.exists() else "a file"
            return f"{existing} is {kind}, no folder"
        with tempfile.TemporaryDirectory(prefix=".wallx_jax.", dir=existing):
            return None
    except OSError as error:
        return f"{error.filename or path} cannot be written ({error.strerror})"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that appears at `path` only if the `with` block succeeds.

    Raises:
        OSError: the file cannot be written. The message names `path` and the remedy; the operating system's own error
            names no file, or the temporary one.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # read-only directory, where it was never created
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_REMEDIES and error.filename in (None, str(temporary)):
            raise OSError(f"{path} cannot be written: {error.strerror}; {DISK_REMEDIES[error.errno]}") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically (see `atomic_file`) as UTF-8, regardless of the locale."""
    if path.exists() and not path.is_file():  # a device or a pipe, which a file must not replace
        try:
            path.write_bytes(text.encode())
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}") from error
        return
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Write a directory that appears at `path` only if the `with` block succeeds.

    The block creates and fills the yielded `partial` path, which is then renamed to `path`. An exception removes it;
    leftovers of a killed process are removed the next time the same path is written.

    Yields:
        The temporary path next to `path`.

    Raises:
        FileExistsError: `path` exists and is not an empty directory.
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; choose another output, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    for leftover in _beginning_with(partial):
        logger.warning("removing %s, left by an interrupted run", leftover)
        shutil.rmtree(leftover)
    try:
        yield partial
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    except BaseException:
        for leftover in _beginning_with(partial):
            shutil.rmtree(leftover, ignore_errors=True)
        raise


def _beginning_with(path: Path) -> list[Path]:
    """Return the siblings whose names start with `path.name`: Orbax renames a directory only once it is complete."""
    return [other for other in path.parent.iterdir() if other.name.startswith(path.name)]


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of entries, to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
