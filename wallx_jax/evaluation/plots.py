"""Plot evaluations and dataset checks to PNG files. matplotlib comes with the `train` extra.

Legend: N frames, A action horizon, D robot dims.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from wallx_jax.dataset_check.findings import Vector
from wallx_jax.evaluation.ablation import Effect
from wallx_jax.evaluation.openloop import Recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.ticker import NullFormatter  # noqa: E402

COLUMNS = 4
DPI = 110


def episode(
    file: Path, recorded: Recorded, chunks: np.ndarray, names: Sequence[str], shown: np.ndarray, title: str
) -> None:
    """Plot the recorded actions of an episode with the predicted chunks on top, one panel per dim.

    Args:
        file: PNG file to write.
        recorded: frames of one episode.
        chunks: [N, A, D], predicted actions.
        names: names of the D dims.
        shown: bool [D], dims to plot.
        title: title of the figure.
    """
    dims = np.flatnonzero(shown)
    rows = -(-len(dims) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 2.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(dims) :]:
        axis.set_visible(False)
    for axis, dim in zip(axes.flat, dims.tolist(), strict=False):
        for row, start in enumerate(recorded.frames):
            steps = start + np.flatnonzero(recorded.valid[row])
            done, predicted = (x[row, : len(steps), dim] for x in (recorded.actions, chunks))
            first = row == 0
            axis.plot(steps, done, "C0", linewidth=2, label="recorded" if first else None)
            axis.plot(steps, predicted, "C1", linewidth=1, label="predicted" if first else None)
            axis.plot(steps[:1], predicted[:1], "C1.", markersize=4)
        axis.set_title(names[dim], fontsize=9)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.supxlabel("frame (dots mark the start of a chunk)", fontsize=8)
    _save(figure, file)


def ablation(file: Path, found: dict[str, Effect], names: Sequence[str], shown: np.ndarray) -> None:
    """Plot the error by replaced input, along the horizon, and by dim relative to intact inputs.

    Args:
        file: PNG file to write.
        found: {replacement: effect}, including "nothing".
        names: names of the D dims.
        shown: bool [D], dims to plot.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    left.barh(list(found), [effect.errors.mean for effect in found.values()])
    left.invert_yaxis()
    left.set(title="mean absolute error by replaced input", xlabel="robot units")
    for name, effect in found.items():
        middle.plot(effect.errors.per_step, label=name)
    middle.set(title="along the horizon", xlabel="step of the chunk", ylabel="mean absolute error")
    middle.legend(fontsize=8)
    dims = np.flatnonzero(shown)
    base = np.maximum(found["nothing"].errors.per_dim[dims], 1e-12)
    ratios = np.array([effect.errors.per_dim[dims] / base for name, effect in found.items() if name != "nothing"])
    image = right.imshow(ratios, aspect="auto", vmin=1, vmax=max(2.0, float(ratios.max())), cmap="viridis")
    right.set_yticks(range(len(ratios)), [name for name in found if name != "nothing"], fontsize=8)
    right.set_xticks(range(len(dims)), [names[dim] for dim in dims.tolist()], rotation=90, fontsize=7)
    right.set_title("error by dim, relative to intact inputs")
    figure.colorbar(image, ax=right)
    _save(figure, file)


def image_grid(file: Path, rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> None:
    """Plot rows of (title, image [h, w, 3]), one row per sample, without interpolation."""
    count = max(map(len, rows))
    figure, axes = plt.subplots(
        len(rows), count, figsize=(3.4 * count, 3 * len(rows)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        for axis, (title, image) in zip(line, row, strict=False):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(title, fontsize=8)
    _save(figure, file)


def dimensions(file: Path, vectors: Sequence[Vector]) -> None:
    """Plot a histogram of every dim of the vectors, with the bounds at which normalization clamps it."""
    rows = [-(-len(vector.names) // COLUMNS) for vector in vectors]
    size = (4 * COLUMNS, 2.2 * sum(rows))
    figure, axes = plt.subplots(sum(rows), COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_visible(False)
    for n, vector in enumerate(vectors):
        for dim, axis in zip(range(len(vector.names)), axes[sum(rows[:n]) :].flat, strict=False):
            axis.set_visible(True)
            values = vector.values[:, dim]
            finite = values[np.isfinite(values)]
            axis.hist(finite, bins=60, color=f"C{n}", log=len(finite) > 0)
            axis.set_ylim(bottom=0.5)  # shows bars of one frame
            for bound in (vector.spread.low[dim], vector.spread.high[dim]):
                axis.axvline(bound, color="black", linestyle="--", linewidth=1)
            title = f"{vector.what}: {vector.names[dim]}"
            axis.set_title(f"{_shorten(title)} ({vector.spread.outside[dim]:.1%} clamped)", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.locator_params(axis="x", nbins=6)
            axis.yaxis.set_minor_formatter(NullFormatter())
    kind = "given statistics" if vectors[0].given else "these values"
    figure.suptitle(f"frames per value (log scale); dashed: q01 and q99 of {kind}, values outside are clamped")
    _save(figure, file)


def trace(
    file: Path, state: Vector, action: Vector, pairs: Sequence[tuple[int, int]], frames: np.ndarray, title: str
) -> None:
    """Plot state and action over the frames of an episode.

    Args:
        file: PNG file to write.
        state: the dataset's state.
        action: the dataset's action.
        pairs: (state dim, action dim) of corresponding dims, which share a panel.
        frames: indices of the frames in the dataset.
        title: title of the figure.
    """
    panels: list[tuple[int | None, int | None]] = [*pairs]
    panels += [(dim, None) for dim in range(len(state.names)) if dim not in [s for s, _ in pairs]]
    panels += [(None, dim) for dim in range(len(action.names)) if dim not in [a for _, a in pairs]]
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 2.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for vector, dim, color in zip((state, action), panel, ("C0", "C1"), strict=True):
            if dim is not None:
                axis.plot(vector.values[frames, dim], color, linewidth=1.2)
                axis.set_title(_shorten(vector.names[dim]), fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=7)
    lines = [plt.Line2D([], [], color=color) for color in ("C0", "C1")]
    figure.legend(lines, ["state", "action"], loc="outside upper right", ncols=2, fontsize=9)
    figure.suptitle(title)
    figure.supxlabel("frame", fontsize=9)
    _save(figure, file)


def _shorten(text: str, most: int = 32) -> str:
    """Shorten a name from the left: joint names differ at the end."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _save(figure: plt.Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
