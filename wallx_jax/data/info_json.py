"""Reads and checks meta/info.json of a LeRobot dataset: format version, frame rate, features and file names."""

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.version import Version

from wallx_jax.data.errors import DatasetError
from wallx_jax.utils import extras
from wallx_jax.utils.files import read_json_object

MOST_FPS = 10_000
Kind = type | tuple[type, ...]  # as for isinstance
FIELDS: dict[str, Kind] = {
    "codebase_version": str, "fps": (int, float), "features": dict, "total_episodes": int, "total_frames": int,
    "data_path": str,
}  # fmt: skip


def read_info_json(file: Path, repo_id: str, local: bool) -> dict[str, Any]:
    """Read meta/info.json and check its version, fields and features.

    Args:
        file: path of info.json.
        repo_id: name of the dataset in error messages.
        local: whether the dataset is a local folder, whose path is then part of the suggested conversion command.

    Raises:
        DatasetError: the file is invalid; lists all errors, with the remedy.
    """
    try:
        info = read_json_object(file)
    except ValueError as error:
        raise DatasetError(str(error)) from None
    version = str(info.get("codebase_version", "unknown"))
    if version.lstrip("v").split(".")[0] in ("1", "2"):
        command = _conversion_command(repo_id, file.parents[1] if local else None)
        raise DatasetError(f"{repo_id} is in LeRobot format {version}; convert it to v3.0 with: {command}")
    if version.lstrip("v").split(".")[0] != "3":
        raise DatasetError(
            f"{repo_id} is in LeRobot format {version}; this package reads v3.0: correct codebase_version in {file} if "
            "that is what it is"
        )

    errors = [
        f"{field!r} is {json.dumps(info.get(field))}, expected {_name(kind)}"
        for field, kind in FIELDS.items()
        if not isinstance(info.get(field), kind) or isinstance(info[field], bool)
    ]
    if not errors:
        if not 0 < info["fps"] <= MOST_FPS:
            errors.append(f"'fps' is {info['fps']}, expected a number above 0 and up to {MOST_FPS}")
        for name, feature in info["features"].items():
            errors += _feature_errors(name, feature)
        errors = errors or list(_template_errors(info))
    if errors:
        raise DatasetError(f"{file}: {'; '.join(errors)}; repair it or copy it again")
    return info


def _feature_errors(name: str, feature: Any) -> Iterable[str]:
    if not isinstance(feature, dict):
        yield f"feature {name!r} is {json.dumps(feature)}, expected an object with dtype, shape and names"
        return
    dtype, shape = feature.get("dtype"), feature.get("shape")
    if not isinstance(dtype, str):
        yield f'feature {name!r} has dtype {json.dumps(dtype)}, expected a string such as "float32"'
        return
    names = feature.get("names")
    flat = names is None or isinstance(names, Mapping) or isinstance(names, list) and all(map(_is_text, names))
    if not flat:
        yield f"feature {name!r} has names {json.dumps(names)}, expected a list of strings"
    for key in ("info", "video_info"):
        if not isinstance(feature.get(key), Mapping | None):
            yield f"feature {name!r} has {key} {json.dumps(feature[key])}, expected an object"
    sizes = shape if isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape) else None
    if sizes is None or (dtype in ("image", "video") and len(sizes) not in (2, 3)):
        expected = "[height, width, channels]" if dtype in ("image", "video") else "a list of sizes such as [14]"
        yield f"feature {name!r} has shape {json.dumps(shape)}, expected {expected}"


def _template_errors(info: Mapping[str, Any]) -> Iterable[str]:
    needs_video = any(feature["dtype"] == "video" for feature in info["features"].values())
    fields = {"chunk_index": 0, "file_index": 0, "video_key": "observation.images.x"}
    for key in ("data_path", *(["video_path"] if needs_video else [])):
        try:
            path = PurePosixPath(info[key].format(**fields))
            sound = path.name and not path.is_absolute() and ".." not in path.parts and "*" not in str(path)
        except (AttributeError, KeyError, IndexError, ValueError, TypeError):
            sound = False
        if not sound:
            yield (
                f"{key!r} is {json.dumps(info.get(key))}, expected a path below the dataset's folder with "
                "{chunk_index} and {file_index}"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _name(kind: Kind) -> str:
    names: dict[Kind, str] = {str: "a string", dict: "an object", int: "a whole number"}
    return names.get(kind, "a number")


def _conversion_command(repo_id: str, root: Path | None) -> str:
    """Return the shell command that converts a v2.1 dataset with the installed lerobot.

    In lerobot 0.5 the module moved, and --root became the dataset's folder instead of its parent.
    """
    try:
        moved, install = Version(importlib.metadata.version("lerobot")) >= Version("0.5"), ""
    except importlib.metadata.PackageNotFoundError:
        moved, install = True, f"{extras.install('lerobot')} && "
    module = "lerobot.scripts" if moved else "lerobot.datasets.v30"
    folder = "" if root is None else f" --root={root.resolve() if moved else root.resolve().parent}"
    return f"{install}python -m {module}.convert_dataset_v21_to_v30 --repo-id={repo_id}{folder} --push-to-hub=false"
