"""Recorded states and actions as signals: their spread, steps that stand out, and how the state follows the action.

Legend: N frames, D robot dims. NaN and infinite values are counted, and left out of everything else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = {"min": 0.0, "q01": 0.01, "median": 0.5, "q99": 0.99, "max": 1.0}
JUMP_FACTOR = 20  # a jump is this many times the 99% quantile of the steps that change something
FEW_STEPS = 20  # too few to say what a typical step is
ENOUGH_FRAMES = 200_000  # to measure a lag: of larger datasets every n-th episode is used
RELATED = 0.3  # correlation of velocities from which on the state is said to follow the action


@dataclass(frozen=True, eq=False)
class Jump:
    """A step that stands out: from the frame before to `frame` (in its episode) a dim changed by `step`, in robot
    units, where `typical` is the 99% quantile of its steps."""

    dim: int
    episode: int
    frame: int
    step: float
    typical: float


@dataclass(frozen=True, eq=False)
class Spread:
    """Of each dim, [D] each. min .. max: of the finite values, NaN where there are none. nans, infinities: how many
    values. constant: it has one value. stuck: it has one value in nearly all frames, so that q01 equals q99. outside:
    share of the values that normalisation clamps, by `low` and `high`."""

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
    """How the state follows the action, by pair of dims, [P] each.

    lag: frames from a movement of the action to the state's, below 0 where the state comes first. correlation: of their
    velocities at that lag, without its sign; 0 where one of them never moves. holds, leads: of the frames after which
    the state changes, the share whose action is exactly this state, and exactly the next one.
    """

    lag: np.ndarray
    correlation: np.ndarray
    holds: np.ndarray
    leads: np.ndarray

    @property
    def related(self) -> np.ndarray:
        """bool [P]: is the correlation high enough for the lag to mean something?"""
        return self.correlation >= RELATED


def spread(values: np.ndarray, bounds: tuple[np.ndarray, np.ndarray] | None = None) -> Spread:
    """What [N, D] values range over. `bounds`: q01 and q99 [D] to normalise with, NaN where
    a dim has none; None: those of the values."""
    nans, infinities = np.isnan(values).sum(axis=0), np.isinf(values).sum(axis=0)
    rows = []
    for column in values.T:
        finite = column[np.isfinite(column)].astype(np.float64)
        rows.append(np.quantile(finite, list(QUANTILES.values())) if len(finite) else [np.nan] * len(QUANTILES))
    found = dict(zip(QUANTILES, np.array(rows).T, strict=True))
    low, high = bounds or (found["q01"], found["q99"])
    # As data.normalize.Normalizer does: where the two are equal, the range is taken as 1.
    high = np.where(_same(low, high), low + 1.0, high)
    # Bounds are float64 and values mostly float32: a value that is a bound is inside.
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
    """Steps between neighbouring frames that are far above what the dim usually does, the largest of a dim first.

    A step counts that is JUMP_FACTOR times the 99% quantile of the dim's steps that change something (the fifth
    largest, in short datasets: one fault must not hide itself). What most of the episodes do is how the dim moves, a
    gripper that closes at once, and no jump.

    Args:
        values: [N, D], in order.
        episodes: int [N], of each frame.
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
    """How the state follows the action. The lag is where the cross-correlation of their velocities is largest: unlike
    positions, those of two moments have little to do with each other.

    Args:
        states, actions: [N, P], in order; column p of one belongs to column p of the other.
        episodes: int [N], of each frame.
        longest: frames of lag that are tried, either way.
    """
    number = np.cumsum(np.r_[0, np.diff(episodes) != 0])
    chosen = number % -(-len(number) // ENOUGH_FRAMES) == 0
    states, actions, number = states[chosen], actions[chosen], number[chosen]
    inside = np.diff(number) == 0
    # `longest` zeros after each episode keep it from being compared with the next.
    rows = np.arange(len(number)) + longest * np.r_[0, np.cumsum(~inside)]
    known = _lay_out(inside.astype(float), rows, longest)
    lags = sorted(range(-longest, longest + 1), key=abs)  # of equals the shortest
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
    """(state dim, action dim) of those that belong together: by name, or by place where no name is shared but state and
    action have as many dims."""
    shared = [(state_names.index(name), i) for i, name in enumerate(action_names) if name in state_names]
    if shared or len(state_names) != len(action_names):
        return shared
    return [(i, i) for i in range(len(state_names))]


def _steps(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """float64 [N - 1] from each frame to the next; 0 where that is another episode's, or a value is missing."""
    with np.errstate(invalid="ignore"):
        steps = np.where(inside, np.diff(x.astype(np.float64)), 0.0)
    return np.where(np.isfinite(steps), steps, 0.0)


def _typical(size: np.ndarray) -> float:
    """The 99% quantile of the sizes above 0, but at most the fifth largest; infinite if there are too few to say."""
    moves = size[size > 0]
    rank = max(len(moves) // 100, 5)
    return float(np.partition(moves, -rank)[-rank]) if len(moves) >= FEW_STEPS else np.inf


def _velocity(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The steps without those that jump, which would outweigh all others."""
    steps = _steps(x, inside)
    return np.where(abs(steps) > JUMP_FACTOR * _typical(abs(steps)), 0.0, steps)


def _lay_out(steps: np.ndarray, rows: np.ndarray, spare: int) -> np.ndarray:
    laid_out = np.zeros(rows[-1] + 1 + spare)
    laid_out[rows[:-1]] = steps
    return laid_out


def _correlations(asked: np.ndarray, done: np.ndarray, known: np.ndarray, lags: Sequence[int]) -> np.ndarray:
    """For each lag the correlation of asked[t] with done[t + lag], over the t at which both are `known` (1, else 0); 0
    where these hold less than half of either's movement: a few steps would agree by chance."""
    n = len(known)

    def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # einsum: a dot of vectors this short costs more in starting BLAS's threads than in products.
        ends = [(slice(max(-k, 0), n - max(k, 0)), slice(max(k, 0), n - max(-k, 0))) for k in lags]
        return np.array([np.einsum("i,i->", a[first], b[second]) for first, second in ends])

    left, right = products(asked**2, known), products(known, done**2)
    enough = (left > 0) & (right > 0) & (2 * left >= asked @ asked) & (2 * right >= done @ done)
    found = abs(products(asked, done)) / np.sqrt(np.where(enough, left * right, 1.0))
    return np.where(enough, found.round(6), 0.0)


def _same(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The same number, as far as float32 can tell."""
    return np.isclose(low, high, rtol=np.finfo(np.float32).eps, atol=0)
