"""Analyse recorded states and actions as signals: spread, outlier steps, and how the state follows the action.

Legend: N frames, D robot dims, P pairs of dims. NaN and infinite values are counted, and excluded from everything else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = {"min": 0.0, "q01": 0.01, "median": 0.5, "q99": 0.99, "max": 1.0}
JUMP_FACTOR = 20  # a jump exceeds the 99% quantile of the non-zero steps by this factor
FEW_STEPS = 20  # with fewer non-zero steps, the typical step size is unknown
ENOUGH_FRAMES = 200_000  # enough to measure a lag: larger datasets are subsampled to every n-th episode
RELATED = 0.3  # the state counts as following the action from this correlation of velocities on


@dataclass(frozen=True, eq=False)
class Jump:
    """An outlier step of a dim between two neighboring frames.

    Attributes:
        dim: index of the dim.
        episode: index of the episode.
        frame: index within the episode of the second of the two frames.
        step: signed change, in robot units.
        typical: 99% quantile of the dim's non-zero step sizes (see `jumps`).
    """

    dim: int
    episode: int
    frame: int
    step: float
    typical: float


@dataclass(frozen=True, eq=False)
class Spread:
    """Distribution of the values of each dim; all arrays are [D].

    Attributes:
        min, q01, median, q99, max: quantiles of the finite values; NaN if there are none.
        nans: number of NaN values.
        infinities: number of infinite values.
        constant: whether the dim has only one value.
        stuck: whether the dim has one value in nearly all frames, so that q01 equals q99.
        low, high: bounds at which normalization clamps.
        outside: fraction of the values that lie outside these bounds.
    """

    min: np.ndarray
    q01: np.ndarray
    median: np.ndarray
    q99: np.ndarray
    max: np.ndarray
    nans: np.ndarray
    infinities: np.ndarray
    constant: np.ndarray
    stuck: np.ndarray
    low: np.ndarray
    high: np.ndarray
    outside: np.ndarray


@dataclass(frozen=True, eq=False)
class LagStats:
    """How the state follows the action for each pair of dims; all arrays are [P].

    Attributes:
        lag: frames from a movement of the action to that of the state; negative where the state moves first.
        correlation: absolute correlation of their velocities at that lag; 0 where one of them never moves.
        holds: among frames after which the state changes, the fraction whose action equals the current state.
        leads: among the same frames, the fraction whose action equals the next state.
    """

    lag: np.ndarray
    correlation: np.ndarray
    holds: np.ndarray
    leads: np.ndarray

    @property
    def related(self) -> np.ndarray:
        """bool [P], whether the correlation is high enough for the lag to be meaningful."""
        return self.correlation >= RELATED


def spread(values: np.ndarray, bounds: tuple[np.ndarray, np.ndarray] | None = None) -> Spread:
    """Measure the distribution of values.

    Args:
        values: [N, D].
        bounds: q01 and q99 [D] used for normalization, NaN where a dim has none; None: those of the values.
    """
    nans, infinities = np.isnan(values).sum(axis=0), np.isinf(values).sum(axis=0)
    rows = []
    for column in values.T:
        finite = column[np.isfinite(column)].astype(np.float64)
        rows.append(np.quantile(finite, list(QUANTILES.values())) if len(finite) else [np.nan] * len(QUANTILES))
    found = dict(zip(QUANTILES, np.array(rows).T, strict=True))
    low, high = bounds or (found["q01"], found["q99"])
    # As in data.normalize.Normalizer: where the two are equal, the range is taken as 1.
    high = np.where(_same(low, high), low + 1.0, high)
    # Bounds are float64 and values mostly float32: the slack keeps values equal to a bound inside.
    slack = np.finfo(np.float32).eps * np.maximum(abs(low), abs(high))
    with np.errstate(invalid="ignore"):
        outside = ((values < low - slack) | (values > high + slack)).sum(axis=0)
    constant = found["min"] == found["max"]
    return Spread(
        **found,
        nans=nans,
        infinities=infinities,
        constant=constant,
        stuck=_same(found["q01"], found["q99"]) & ~constant,
        low=low,
        high=high,
        outside=outside / max(len(values), 1),
    )


def jumps(values: np.ndarray, episodes: np.ndarray) -> list[Jump]:
    """Find steps between neighboring frames that are far larger than usual for the dim.

    A jump exceeds JUMP_FACTOR times the 99% quantile of the dim's non-zero steps (in short datasets the fifth largest
    one, so that a single fault cannot raise the threshold above itself). A step that occurs in most episodes is normal
    motion, e.g. of a binary gripper, not a jump.

    Args:
        values: [N, D], in recorded order.
        episodes: int [N], episode index of each frame.

    Returns:
        jumps by dim, the largest of a dim first.
    """
    inside = np.diff(episodes) == 0
    starts = np.flatnonzero(np.r_[True, ~inside])
    count, found = len(starts), []
    for dim, column in enumerate(values.T):
        size = abs(_steps(column, inside))
        typical = _typical(size)
        places = np.flatnonzero(size > JUMP_FACTOR * typical) + 1
        if 2 * len(set(episodes[places].tolist())) > max(count, 2):
            continue
        for place in places[np.argsort(-size[places - 1], kind="stable")]:
            frame = place - starts[np.searchsorted(starts, place, side="right") - 1]
            step = float(column[place]) - float(column[place - 1])
            found.append(Jump(dim, int(episodes[place]), int(frame), step, typical))
    return found


def following(states: np.ndarray, actions: np.ndarray, episodes: np.ndarray, longest: int) -> LagStats:
    """Measure how the state follows the action.

    The lag maximizes the cross-correlation of their velocities, which unlike positions have little autocorrelation.

    Args:
        states: [N, P], in recorded order.
        actions: [N, P]; column p corresponds to column p of `states`.
        episodes: int [N], episode index of each frame.
        longest: maximum lag to try in either direction, in frames.
    """
    number = np.cumsum(np.r_[0, np.diff(episodes) != 0])
    chosen = number % -(-len(number) // ENOUGH_FRAMES) == 0
    states, actions, number = states[chosen], actions[chosen], number[chosen]
    inside = np.diff(number) == 0
    # `longest` zeros after each episode keep it from being compared with the next.
    rows = np.arange(len(number)) + longest * np.r_[0, np.cumsum(~inside)]
    known = _lay_out(inside.astype(float), rows, longest)
    lags = sorted(range(-longest, longest + 1), key=abs)  # of equal correlations, the shortest lag wins
    best, correlation, holds, leads = [], [], [], []
    for state, action in zip(states.T, actions.T, strict=True):
        done, asked = (_lay_out(_velocity(x, inside), rows, longest) for x in (state, action))
        found = _correlations(asked, done, known, lags)
        best.append(lags[int(np.argmax(found))])
        correlation.append(found.max())
        moved = inside & (state[1:] != state[:-1]) & np.isfinite(state[1:]) & np.isfinite(state[:-1])
        count = max(moved.sum(), 1)
        holds.append((moved & (action[:-1] == state[:-1])).sum() / count)
        leads.append((moved & (action[:-1] == state[1:])).sum() / count)
    return LagStats(np.array(best, int), *(np.array(x, float) for x in (correlation, holds, leads)))


def pairs(state_names: Sequence[str], action_names: Sequence[str]) -> list[tuple[int, int]]:
    """Match state and action dims by name; if no name is shared but their numbers of dims are equal, by position.

    Returns:
        (state dim, action dim) of each pair.
    """
    shared = [(state_names.index(name), i) for i, name in enumerate(action_names) if name in state_names]
    if shared or len(state_names) != len(action_names):
        return shared
    return [(i, i) for i in range(len(state_names))]


def _steps(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the steps, float64 [N - 1], from each frame to the next; 0 across episodes and at missing values."""
    with np.errstate(invalid="ignore"):
        steps = np.where(inside, np.diff(x.astype(np.float64)), 0.0)
    return np.where(np.isfinite(steps), steps, 0.0)


def _typical(size: np.ndarray) -> float:
    """Return the 99% quantile of the non-zero sizes, at most the fifth largest; infinity if there are too few."""
    moves = size[size > 0]
    rank = max(len(moves) // 100, 5)
    return float(np.partition(moves, -rank)[-rank]) if len(moves) >= FEW_STEPS else np.inf


def _velocity(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the steps with jumps set to 0, which would outweigh all others."""
    steps = _steps(x, inside)
    return np.where(abs(steps) > JUMP_FACTOR * _typical(abs(steps)), 0.0, steps)


def _lay_out(steps: np.ndarray, rows: np.ndarray, spare: int) -> np.ndarray:
    laid_out = np.zeros(rows[-1] + 1 + spare)
    laid_out[rows[:-1]] = steps
    return laid_out


def _correlations(asked: np.ndarray, done: np.ndarray, known: np.ndarray, lags: Sequence[int]) -> np.ndarray:
    """Correlate asked[t] with done[t + lag] for each lag, over the t at which both are `known` (1, else 0).

    The correlation is 0 where these t cover less than half of the squared movement of either: a few steps would agree
    by chance.
    """
    n = len(known)

    def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # einsum rather than dot: for vectors this short, starting BLAS's threads costs more than the products.
        ends = [(slice(max(-k, 0), n - max(k, 0)), slice(max(k, 0), n - max(-k, 0))) for k in lags]
        return np.array([np.einsum("i,i->", a[first], b[second]) for first, second in ends])

    left, right = products(asked**2, known), products(known, done**2)
    enough = (left > 0) & (right > 0) & (2 * left >= asked @ asked) & (2 * right >= done @ done)
    found = abs(products(asked, done)) / np.sqrt(np.where(enough, left * right, 1.0))
    return np.where(enough, found.round(6), 0.0)


def _same(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether numbers are equal up to float32 precision."""
    return np.isclose(low, high, rtol=np.finfo(np.float32).eps, atol=0)
