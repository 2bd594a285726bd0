"""Format the report of a dataset check as text and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.dataset_check import signals
from wallx_jax.dataset_check.check import Report
from wallx_jax.dataset_check.findings import Vector

SHOWN_TASKS = 20  # number of tasks in the text report, the most frequent ones


def as_json(report: Report) -> dict[str, Any]:
    """Return all statistics and findings as a JSON-serialisable dict; non-finite numbers become None."""
    info, look = report.info, report.look
    lag = report.tables.following
    return _plain(
        {
            "dataset": info.repo_id,
            "episodes": info.num_episodes,
            "frames": info.num_frames,
            "fps": info.fps,
            "duration_s": info.num_frames / info.fps,
            "episode_lengths": _lengths(report),
            "tasks": [
                {"task": text, "frames": frames, "episodes": episodes}
                for text, (frames, episodes) in zip(info.tasks.values(), report.tables.task_counts, strict=True)
            ],
            "cameras": {
                camera: {
                    "size": info.frame_size(camera),
                    "decoded": seen.frames,
                    "brightness": seen.brightness if seen.frames else None,
                    "black_frames": seen.dark,
                    "frozen_episodes": seen.frozen,
                }
                for camera, seen in look.cameras.items()
            },
            "frames_looked_at": look.frames,
            "undecodable": [dataclasses.asdict(one) for one in look.undecodable],
            **{vector.what: _vector_json(vector) for vector in (report.tables.state, report.tables.action)},
            "action_to_state": [
                {
                    "state": report.tables.state.names[s],
                    "action": report.tables.action.names[a],
                    "lag_frames": lag.lag[i] if lag.related[i] else None,
                    "correlation": lag.correlation[i],
                    "action_is_state": lag.holds[i],
                    "action_is_next_state": lag.leads[i],
                }
                for i, (s, a) in enumerate(report.tables.pairs)
            ],
            "findings": [dataclasses.asdict(finding) for finding in report.findings],
        }
    )


def as_text(report: Report) -> str:
    """Format the statistics as tables, followed by the findings, errors first."""
    info, lengths, look = report.info, _lengths(report), report.look
    duration = info.num_frames / info.fps
    parts = [
        f"{info.repo_id}: {info.num_episodes} episodes, {info.num_frames} frames at {info.fps:g} fps, "
        + (f"{duration:.0f} s" if duration < 600 else f"{duration / 3600:.2f} h"),
        f"episode lengths in frames: {lengths['min']} to {lengths['max']}, median {lengths['median']:g}; "
        f"{lengths['shorter_than_horizon']} shorter than the horizon of {report.horizon}",
        _table(
            ["camera", "height x width", "mean brightness (0-255)", "frames decoded"],
            [
                [camera, _size(info, camera), f"{seen.brightness:.0f}" if seen.frames else "-", str(seen.frames)]
                for camera, seen in look.cameras.items()
            ],
        ),
        _task_table(report),
        *(_vector_table(vector) for vector in (report.tables.state, report.tables.action)),
        *([_following_table(report)] if report.tables.pairs else []),
        "\n".join(map(str, report.findings)),
    ]
    return "\n\n".join(parts)


def _lengths(report: Report) -> dict[str, Any]:
    lengths = report.info.episode_lengths
    return {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "max": int(lengths.max()),
        "shorter_than_horizon": int((lengths < report.horizon).sum()),
    }


def _vector_json(vector: Vector) -> dict[str, Any]:
    spread = vector.spread
    columns = {f.name: getattr(spread, f.name) for f in dataclasses.fields(spread)}
    dims = [
        {"name": name, "used": vector.used[d]} | {column: values[d] for column, values in columns.items()}
        for d, name in enumerate(vector.names)
    ]
    jumps = [dataclasses.asdict(jump) | {"dim": vector.names[jump.dim]} for jump in vector.jumps]
    return {"key": vector.key, "given_statistics": vector.given, "dims": dims, "jumps": jumps}


def _task_table(report: Report) -> str:
    tasks = report.info.tasks.values()
    counted = sorted(zip(tasks, report.tables.task_counts, strict=True), key=lambda entry: -entry[1][0])
    rows = [[repr(text), str(frames), str(episodes)] for text, (frames, episodes) in counted[:SHOWN_TASKS]]
    more = f"\n... and {len(counted) - len(rows)} more" if len(counted) > len(rows) else ""
    return _table(["instruction", "frames", "episodes"], rows) + more


def _vector_table(vector: Vector) -> str:
    spread = vector.spread
    jumps = np.bincount([jump.dim for jump in vector.jumps], minlength=len(vector.names))
    rows = [
        [name, *(f"{getattr(spread, column)[d]:.4g}" for column in signals.QUANTILES), f"{spread.outside[d]:.1%}",
         *(str(counts[d] or "") for counts in (spread.nans, spread.infinities, jumps)),
         "" if vector.used[d] else "not used"]
        for d, name in enumerate(vector.names)
    ]  # fmt: skip
    return _table([f"{vector.what} ({vector.key})", *signals.QUANTILES, "clamped", "NaN", "inf", "jumps", ""], rows)


def _following_table(report: Report) -> str:
    lag = report.tables.following
    rows = [
        [report.tables.action.names[a], str(lag.lag[i]) if lag.related[i] else "-", f"{lag.correlation[i]:.2f}",
         f"{lag.holds[i]:.0%}", f"{lag.leads[i]:.0%}"]
        for i, (_, a) in enumerate(report.tables.pairs)
    ]  # fmt: skip
    heads = ["the state follows the action", "by frames", "correlation", "action is state", "is next state"]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with the first column left-aligned and the others right-aligned."""
    rows = [heads, *rows]
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([name.ljust(first), *map(str.rjust, cells, widths)]) for name, *cells in rows]
    return "\n".join(line.rstrip() for line in lines)


def _size(info: DatasetInfo, camera: str) -> str:
    return "x".join(map(str, info.frame_size(camera)))


def _plain(value: Any) -> Any:
    """Convert NumPy scalars to Python numbers, recursively in lists and dicts; non-finite ones become None."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
