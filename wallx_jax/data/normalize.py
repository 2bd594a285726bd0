"""Normalises states and actions by their quantiles, with one class for training, evaluation and inference.

Also reads and writes norm_stats.json.

Legend: D robot dims, C model channels.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wallx_jax.utils.files import atomic_file, read_json_object

logger = logging.getLogger(__name__)

FILE_NAME = "norm_stats.json"


@dataclass(frozen=True, eq=False)
class Stats:
    """Per-dimension statistics in robot units, float64 [D] each.

    Attributes:
        mean: mean.
        std: standard deviation.
        q01: 1% quantile.
        q99: 99% quantile.
        min: minimum.
        max: maximum.

    Raises:
        ValueError: naming the statistic, if shapes differ, a value is not finite, or one contradicts another.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    min: np.ndarray
    max: np.ndarray

    def __post_init__(self) -> None:
        for name in ("q01", "q99", "min", "max", "mean", "std"):
            value = np.asarray(getattr(self, name), np.float64)
            if value.ndim != 1 or value.shape != np.shape(self.q01):
                raise ValueError(
                    f"{name} has shape {value.shape}, q01 {np.shape(self.q01)}; expected one value per dim"
                )
            if not np.isfinite(value).all():
                raise ValueError(f"{name} is not finite at dims {np.flatnonzero(~np.isfinite(value)).tolist()}")
            object.__setattr__(self, name, value)
        if (self.q99 < self.q01).any():
            raise ValueError(f"q99 is below q01 at dims {np.flatnonzero(self.q99 < self.q01).tolist()}")
        for wrong, what in ((self.max < self.min, "max is below min"), (self.std < 0, "std is below 0")):
            if wrong.any():
                raise ValueError(f"{what} at dims {np.flatnonzero(wrong).tolist()}")

    def __len__(self) -> int:
        return len(self.q01)


@dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of a robot's state and action, with the dataset keys they belong to.

    Attributes:
        state: statistics of the state.
        action: statistics of the action.
        state_key: dataset key of the state.
        action_key: dataset key of the action.
        relative_to: state dim per action dim whose value is subtracted before normalisation, or -1; empty for none. The
            statistics of such an action dim are those of the differences over the next `horizon` steps.
        horizon: steps of an action chunk; None where no action is relative.
    """

    state: Stats
    action: Stats
    state_key: str
    action_key: str
    relative_to: tuple[int, ...] = ()
    horizon: int | None = None

    def check_relative(self, relative_to: tuple[int, ...], horizon: int) -> None:
        """Check that the action statistics are those of actions `relative_to` the state over `horizon` steps.

        Raises:
            ValueError: if they were computed from other differences.
        """
        wanted = (relative_to, horizon if relative_to else None)
        if (self.relative_to, self.horizon) != wanted:
            raise ValueError(
                f"the statistics are of {_differences(self.relative_to, self.horizon)}, but wanted are those of "
                f"{_differences(*wanted)}"
            )

    def difference(self, other: "NormStats") -> str:
        """Describe the first value that differs from other statistics by more than rounding; empty if none does."""
        for part in ("state", "action"):
            ours, theirs = getattr(self, part), getattr(other, part)
            if len(ours) != len(theirs):
                return f"{part} has {len(ours)} dims, there {len(theirs)}"
            for field in dataclasses.fields(Stats):
                a, b = getattr(ours, field.name), getattr(theirs, field.name)
                if (apart := np.flatnonzero(~np.isclose(a, b, rtol=1e-6, atol=1e-9))).size:
                    dim = apart[0]
                    return f"{field.name} of {part} dim {dim} is {a[dim]:.6g}, there {b[dim]:.6g}"
        return ""


class Normalizer:
    """Maps q01..q99 to [-1, 1] with clamping, zero-pads D dims to C channels, and inverts both.

    Where q01 equals q99, or they differ by less than float32 resolution, the range is taken as 1, as upstream does when
    normalising, so that a constant maps to -1. In the inverse, a dim that never moved (min equals max) returns its
    constant regardless of the model's output, while a dim that moved in under 1% of the frames (e.g. a rarely used
    gripper) is inverted over that range of 1. With a file without min and max (upstream's) such a dim counts as
    constant, as upstream does.

    Args:
        stats: statistics of the D dims.
        width: C.

    Attributes:
        stats: as given.
        dims: D.
        width: C.

    Raises:
        ValueError: if D > C.
    """

    def __init__(self, stats: Stats, width: int):
        if len(stats) > width:
            raise ValueError(f"the robot has {len(stats)} dims but the model only {width} channels; widen the model")
        self.stats, self.dims, self.width = stats, len(stats), width
        self._low = stats.q01
        self._span = np.where(_equal(stats.q01, stats.q99), 1.0, stats.q99 - stats.q01)
        self._inverse_span = np.where(_equal(stats.min, stats.max) & _equal(stats.q01, stats.q99), 0.0, self._span)

    def normalize(self, x: Any) -> np.ndarray:
        """Map robot units [..., D] to float32 [..., C] in [-1, 1]; non-finite values and the channels past D become 0.

        Raises:
            ValueError: if the last axis is not D.
        """
        x = np.asarray(x, np.float64)
        if x.shape[-1] != self.dims:
            raise ValueError(f"expected {self.dims} dims as in the norm stats, got an array of shape {x.shape}")
        # Clamping before dividing equals clamping after, but cannot overflow however small the range.
        y = (np.clip(x, self._low, self._low + self._span) - self._low) / self._span * 2 - 1
        return self.pad(np.where(np.isfinite(x), np.clip(y, -1, 1), 0.0))

    def pad(self, x: Any) -> np.ndarray:
        """Zero-pad values or flags [..., D] to float32 [..., C]."""
        x = np.asarray(x, np.float32)
        padded = np.zeros((*x.shape[:-1], self.width), np.float32)
        padded[..., : self.dims] = x
        return padded

    def mask(self) -> np.ndarray:
        """Return a float32 [C] mask that is 1 for the robot's channels."""
        return self.pad(np.ones(self.dims))

    def unnormalize(self, x: Any) -> np.ndarray:
        """Map model units [..., C] or [..., D] to float32 robot units [..., D].

        As upstream, this does not clamp: values beyond the range of float32 become infinite.

        Raises:
            ValueError: if the last axis is neither C nor D.
        """
        x = np.asarray(x, np.float64)
        if x.shape[-1] not in (self.width, self.dims):
            raise ValueError(f"expected {self.width} channels or {self.dims} dims, got an array of shape {x.shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            return ((x[..., : self.dims] + 1) / 2 * self._inverse_span + self._low).astype(np.float32)


def save_norm_stats(path: str | Path, stats: NormStats) -> None:
    """Write norm_stats.json atomically.

    The layout is upstream's `{"norm_stats": {key: {mean, std, q01, q99}}}` with min and max added. If actions are
    relative to the state, `"relative_actions": {relative_to, horizon}` is stored next to "norm_stats".

    Args:
        path: the file, or an existing folder to put it in.
        stats: the statistics.
    """
    rows = {
        key: {f.name: getattr(part, f.name).tolist() for f in dataclasses.fields(part)}
        for key, part in ((stats.state_key, stats.state), (stats.action_key, stats.action))
    }
    content: dict[str, Any] = {"norm_stats": rows}
    if stats.relative_to:
        content["relative_actions"] = {"relative_to": list(stats.relative_to), "horizon": stats.horizon}
    with atomic_file(_file(path)) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def load_norm_stats(
    path: str | Path, state_key: str | None = None, action_key: str | None = None, robot: str | None = None
) -> NormStats:
    """Load norm_stats.json in either of upstream's layouts, or a LeRobot dataset's meta/stats.json.

    Upstream's layouts are `{"norm_stats": {key: {mean, std, q01, q99}}}` and `{robot: {key: {min, q01, q99, max,
    ...}}}`; LeRobot's is `{key: {mean, std, min, max, q01, q99, count, ...}}`. Missing statistics are filled in: min
    and max from q01 and q99, mean and std from the middle and half of the range (they are not used for normalisation).

    LeRobot's q01 and q99 are per-episode quantiles averaged by episode length (`aggregate_feature_stats` in its
    compute_stats.py), so their range is narrower than that of `compute_stats`; a warning is logged.

    Args:
        path: the file, or the folder that contains it.
        state_key: entry of the state; by default the only one whose name contains "state".
        action_key: entry of the action; by default the only one whose name contains "action".
        robot: which robot's entries to use in the second layout; by default the only one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file if it is damaged, the available keys if one is missing, or the invalid statistic.
    """
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(f"no norm stats at {file}; without norm_stats_path they are computed from the dataset")
    rows: Any = read_json_object(file)
    relative_to, horizon = _read_relative(file, rows.get("relative_actions"))
    if "norm_stats" in rows:
        rows = rows["norm_stats"]
    elif any(_is_statistics(row) for row in rows.values()):
        logger.warning(
            "%s is LeRobot's: its q01 and q99 are averages over the episodes, narrower than the quantiles of all "
            "frames; scripts/compute_norm_stats.py computes those",
            file,
        )
    else:
        rows = _pick(file, rows, robot, "", "robot")
    state_key, state = _read(file, rows, state_key, "state")
    action_key, action = _read(file, rows, action_key, "action")
    return NormStats(state, action, state_key, action_key, relative_to, horizon)


def _equal(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return where low <= high are equal up to float32 resolution."""
    return high - low <= np.finfo(np.float32).eps * np.maximum(abs(low), abs(high))


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _is_statistics(row: Any) -> bool:
    """Distinguish LeRobot's {statistic: numbers} (True) from a robot's {key: {statistic: numbers}} (False)."""
    return isinstance(row, Mapping) and isinstance(row.get("mean"), list)


def _pick(file: Path, rows: Any, key: str | None, hint: str, what: str) -> Any:
    if not isinstance(rows, Mapping):
        raise ValueError(f"{file}: expected an object of {what} entries, found {type(rows).__name__}")
    if key is None:
        likely = [k for k in rows if hint in k]
        key = likely[0] if len(likely) == 1 else None
    if key not in rows:
        wanted = f"no {what} {key!r}" if key else f"name the {what} key, it is not clear which is meant"
        raise ValueError(f"{file}: {wanted}; the file has {sorted(rows)}")
    return rows[key]


def _read_relative(file: Path, row: Any) -> tuple[tuple[int, ...], int | None]:
    if row is None:
        return (), None
    try:
        return tuple(map(int, row["relative_to"])), int(row["horizon"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: 'relative_actions' needs relative_to and horizon, it is {row!r}") from error


def _differences(relative_to: tuple[int, ...], horizon: int | None) -> str:
    if not relative_to:
        return "absolute actions"
    dims = {action: state for action, state in enumerate(relative_to) if state >= 0}
    return f"actions relative to the state (action dim: state dim) {dims} over {horizon} steps"


def _read(file: Path, rows: Any, key: str | None, what: str) -> tuple[str, Stats]:
    row = _pick(file, rows, key, what, what)
    key = key or next(k for k in rows if rows[k] is row)
    if not isinstance(row, Mapping) or not {"q01", "q99"} <= set(row):
        has = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"{file}: {key!r} needs q01 and q99, it has {has}; compute them with scripts/compute_norm_stats.py"
        )
    try:
        q01, q99 = np.asarray(row["q01"], np.float64), np.asarray(row["q99"], np.float64)
        if q01.ndim != 1 or q01.shape != q99.shape:
            raise ValueError(f"q01 has shape {q01.shape}, q99 {q99.shape}; expected one value per dim")
        defaults = {"min": q01, "max": q99, "mean": (q01 + q99) / 2, "std": (q99 - q01) / 2, "q01": q01, "q99": q99}
        return key, Stats(**{name: row.get(name, value) for name, value in defaults.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {key!r}: {error}") from error
