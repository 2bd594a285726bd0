"""Check the features of a LeRobot dataset being written and their values, and convert them to Arrow columns."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

NUMERIC = ("float32", "float64", "int64", "int32", "bool")
CAMERA = ("image", "video")
BOOKKEEPING = {
    key: {"dtype": "float32" if key == "timestamp" else "int64", "shape": (1,), "names": None}
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index")
}
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})

Features = dict[str, dict[str, Any]]


def check_features(features: Mapping[str, Mapping[str, Any]]) -> Features:
    """Check the features of a new dataset.

    Args:
        features: {key: {"dtype", "shape", "names"}}.

    Returns:
        The same with shapes as tuples, default names for cameras without any, and the bookkeeping features.

    Raises:
        ValueError: naming the feature that cannot be written.
    """
    if not features:
        raise ValueError("features is empty; define at least one, such as observation.state")
    checked = {}
    for key, feature in features.items():
        if key in BOOKKEEPING:
            raise ValueError(f"{key} is one of {list(BOOKKEEPING)}, which the writer adds; leave it out of features")
        if not key or "/" in key:
            raise ValueError(f"feature name {key!r} is empty or contains '/'; separate the parts of a name with '.'")
        dtype, shape = feature.get("dtype"), tuple(feature.get("shape") or ())
        if dtype not in (*NUMERIC, *CAMERA, "string"):
            raise ValueError(f"{key} has dtype {dtype!r}; choose one of {[*NUMERIC, 'string', *CAMERA]}")
        if not all(isinstance(n, int) and n > 0 for n in shape) or not _shape_fits(dtype, shape):
            expected = "(H, W, 3)" if dtype in CAMERA else "(1,)" if dtype == "string" else "(D,)"
            raise ValueError(f"{key} has dtype {dtype} and shape {shape}; expected shape {expected}")
        if dtype == "video" and (shape[0] % 2 or shape[1] % 2):
            raise ValueError(
                f"{key} has frames of {shape[0]}x{shape[1]} pixels; yuv420p video needs an even height and width: crop "
                'or pad the frames, or store them with dtype "image"'
            )
        names = ["height", "width", "channels"] if dtype in CAMERA else None
        checked[key] = {**feature, "shape": shape, "names": feature.get("names") or names}
    return checked | BOOKKEEPING


def _shape_fits(dtype: str, shape: tuple[int, ...]) -> bool:
    if dtype in CAMERA:
        return len(shape) == 3 and shape[2] == 3
    return shape == (1,) if dtype == "string" else len(shape) == 1


def check_values(values: Mapping[str, Any], features: Features) -> tuple[int, dict[str, Any]]:
    """Check an episode's values, except frames that an iterable yields one at a time.

    Args:
        values: {key: the T values of the feature}.
        features: as returned by `check_features`.

    Returns:
        T and the values: arrays [T, D] of vectors and [T] of scalars, lists of strings, frames unchanged.

    Raises:
        ValueError: naming the feature that does not match its definition.
    """
    expected = [key for key in features if key not in BOOKKEEPING]
    if unknown := [key for key in values if key not in expected]:
        raise ValueError(f"the episode has {unknown}, but the dataset's features are {expected}; remove them")
    if missing := [key for key in expected if key not in values]:
        raise ValueError(f"the episode lacks {missing}; add them, with one value per frame")
    lengths = {key: len(values[key]) for key in expected if hasattr(values[key], "__len__")}
    if not lengths:
        raise ValueError(f"the length of the episode is unknown; pass at least one of {expected} as an array or list")
    first, length = next(iter(lengths.items()))
    for key, other in lengths.items():
        if other != length:
            raise ValueError(f"{first} has {length} frames, but {key} has {other}; pass one value per frame for each")
    if not length:
        raise ValueError(f"the episode is empty: {first} has 0 frames; leave it out")
    return length, {key: _check_value(key, values[key], features[key], length) for key in expected}


def _check_value(key: str, value: Any, feature: Mapping[str, Any], length: int) -> Any:
    dtype, shape = feature["dtype"], feature["shape"]
    if dtype in CAMERA:
        if isinstance(value, np.ndarray | list | tuple):
            for number, frame in enumerate(value):
                _check_frame(key, number, frame, shape)
        elif not isinstance(value, Iterable):
            raise ValueError(f"{key} is {type(value).__name__}; expected an array or an iterable of {length} frames")
        return value
    if dtype == "string":
        texts = [] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
        if len(texts) != length or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key} is not a sequence of strings; pass {length} of them, one per frame")
        return texts
    array = np.asarray(value)
    if array.dtype != dtype:
        raise ValueError(f"{key} has dtype {array.dtype}; the feature is {dtype}, convert it with .astype({dtype!r})")
    if array.shape != (length, *shape) and (array.shape != (length,) or shape != (1,)):
        raise ValueError(f"{key} has shape {array.shape}; expected {(length, *shape)}")
    return array[:, 0] if shape == (1,) and array.ndim == 2 else array


def _check_frame(key: str, number: int, frame: Any, shape: tuple[int, ...]) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.shape != shape or frame.dtype != np.uint8:
        raise ValueError(
            f"{key}: frame {number} is {frame.dtype} {list(frame.shape)}; expected uint8 {list(shape)}, values 0 to 255"
        )
    return frame


def check_frames(key: str, frames: Iterable[Any], length: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield a camera's frames, uint8 [H, W, 3] each, checking each of them and their number.

    Raises:
        ValueError: naming the frame that does not match the feature, or the number of frames.
    """
    number = -1
    for number, frame in enumerate(frames):
        if number == length:
            raise ValueError(f"{key} yields more than the {length} frames that the episode has")
        yield _check_frame(key, number, frame, shape)
    if number + 1 < length:
        raise ValueError(f"{key} yields {number + 1} frames, but the episode has {length}")


def check_tasks(task: str | Sequence[str], length: int) -> list[str]:
    """Return the instruction of each frame.

    Raises:
        ValueError: if one is missing or blank.
    """
    tasks = [task] * length if isinstance(task, str) else list(task)
    if len(tasks) != length:
        raise ValueError(f"task has {len(tasks)} instructions for {length} frames; pass one string, or one per frame")
    for frame, text in enumerate(tasks):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"task of frame {frame} is {text!r}; expected an instruction, such as 'open the cabinet'")
    return tasks


def column(values: Any, feature: Mapping[str, Any]) -> pa.Array:
    """Convert checked values to a column: plain values for shape (1,), fixed-size lists for vectors."""
    if isinstance(values, list):
        return pa.array(values, pa.string())
    flat = pa.array(np.ascontiguousarray(values).ravel(), pa.from_numpy_dtype(feature["dtype"]))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def image_column(frames: Iterable[np.ndarray]) -> pa.Array:
    """Encode frames, uint8 [H, W, 3] each, as a column of PNG files."""
    rows = []
    for number, frame in enumerate(frames):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": f"frame-{number:06d}.png"})
    return pa.array(rows, IMAGE_TYPE)


def schema_metadata(features: Features) -> dict[str, str]:
    """Return the schema metadata that tells Hugging Face `datasets` which struct columns are images."""
    return {"huggingface": json.dumps({"info": {"features": {k: _hf_feature(f) for k, f in features.items()}}})}


def _hf_feature(feature: Mapping[str, Any]) -> dict[str, Any]:
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    value = {"dtype": feature["dtype"], "_type": "Value"}
    return value if feature["shape"] == (1,) else {"feature": value, "length": feature["shape"][0], "_type": "List"}
