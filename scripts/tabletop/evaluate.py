"""Evaluate a policy on the tabletop: open loop on held-out episodes and closed loop in the simulator.

Both are repeated with one of its inputs blanked.

Legend: N observations, A action horizon, D robot dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wallx_jax.utils import extras

extras.require("train", __name__)

import matplotlib
import numpy as np

from tabletop import simulator
from wallx_jax.config.robots import ALOHA_DOF
from wallx_jax.evaluation.openloop import Recorded, predict
from wallx_jax.inference.policy import Observation, Policy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

BATCH = 50  # observations per call of the policy; constant, so that it is compiled once
TEST_SEED = 1_000_000  # no dataset contains layouts with seeds from here on
CALLS, EXECUTED = 4, 6  # policy calls per episode, and executed actions per chunk


def blanks(policy: Policy) -> dict[str, Callable[[Observation], Observation]]:
    """Return {blanked input: observation -> changed observation}; "nothing" leaves it unchanged.

    Images become grey, the colour in the instruction becomes "unnamed", the state becomes its training mean.
    """
    average = policy.processor.stats.state.mean

    def picture(o: Observation) -> Observation:
        return o | {"images": {key: np.full_like(image, 127) for key, image in o["images"].items()}}

    return {
        "nothing": lambda o: o,
        "picture": picture,
        "words": lambda o: o | {"instruction": simulator.instruction(simulator.UNNAMED)},
        "state": lambda o: o | {"state": average},
    }


@dataclass(frozen=True)
class Rollout:
    """One closed-loop episode.

    Attributes:
        layout: the start.
        path: [steps, 2 arms, 3], positions of both tips.
        reached: the colour reached in the end, if any.
    """

    layout: simulator.Layout
    path: np.ndarray
    reached: str | None

    @property
    def success(self) -> bool:
        return self.reached == self.layout.target

    @property
    def wrong(self) -> bool:
        return self.reached not in (None, self.layout.target)


def test_layouts(count: int) -> list[simulator.Layout]:
    return [simulator.sample_layout(np.random.default_rng(TEST_SEED + i)) for i in range(count)]


def roll_out(
    policy: Policy, layouts: Sequence[simulator.Layout], blank: Callable[[Observation], Observation]
) -> list[Rollout]:
    """Run all layouts in parallel: CALLS times, predict a chunk and execute the first EXECUTED of its actions."""
    sims = [simulator.Tabletop(layout) for layout in layouts]
    paths = [[[sim.hand(0), sim.hand(1)]] for sim in sims]
    for call in range(CALLS):
        chunks = predict(policy, [blank(sim.observation()) for sim in sims], BATCH, seed=call)
        for sim, path, chunk in zip(sims, paths, chunks, strict=True):
            for action in chunk[:EXECUTED]:
                sim.step(action)
                path.append([sim.hand(0), sim.hand(1)])
    return [Rollout(sim.layout, np.array(path), sim.reached()) for sim, path in zip(sims, paths, strict=True)]


def rate(flags: Sequence[bool]) -> float:
    return float(np.mean(list(flags)))


def plot(file: Path, recorded: Recorded, chunks: np.ndarray, rollouts: Sequence[Rollout], results: dict) -> None:
    """Plot predicted chunks over recorded actions, success rates as bars, and a few layouts with the hands' paths."""
    figure = plt.figure(figsize=(14, 9), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1)
    names = list(ALOHA_DOF)
    shown = [names.index(f"{side}_{joint}") for side in ("left", "right") for joint in ("waist", "shoulder")]
    first = recorded.episodes <= recorded.episodes[0] + 2
    ends = np.flatnonzero(np.diff(recorded.episodes[first])) + 0.5
    for axis, dim in zip(top.subplots(1, len(shown)), shown, strict=True):
        frames = np.arange(first.sum())
        axis.plot(frames, recorded.actions[first, 0, dim], "k", linewidth=2, label="expert")
        for frame in frames:
            ahead = chunks[frame, recorded.valid[frame], dim]
            axis.plot(frame + np.arange(len(ahead)), ahead, "C1", linewidth=0.8, label="policy" if not frame else None)
        for end in ends:
            axis.axvline(end, color="0.8")
        axis.set(title=names[dim], xlabel="frame of three held-out episodes")
    top.axes[0].set_ylabel("rad")
    top.axes[0].legend()

    left, right = middle.subplots(1, 2)
    open_loop, closed_loop = results["open_loop"], results["closed_loop"]
    left.bar(list(open_loop), list(open_loop.values()))
    left.set(title="open loop: mean absolute error on held-out episodes")
    reached = [case["named"] for case in closed_loop.values()]
    right.bar(list(closed_loop), reached, label="the named block")
    right.bar(list(closed_loop), [case["other"] for case in closed_loop.values()], bottom=reached, label="another one")
    right.set(title=f"closed loop: block reached in {len(rollouts)} held-out layouts", ylim=(0, 1))
    right.legend()

    for axis, rollout in zip(bottom.subplots(1, 5), rollouts, strict=False):
        axis.imshow(simulator.Tabletop(rollout.layout).observation()["images"][simulator.OVERHEAD])
        for arm, color in enumerate(("white", "cyan")):
            line = simulator.to_pixels(rollout.path[:, arm])
            style = "-o" if arm == rollout.layout.free_arm else ":"
            axis.plot(*line.T, style, color=color, markersize=2, linewidth=1)
        height, width = simulator.CAMERAS[simulator.OVERHEAD]
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
        outcome = "reached" if rollout.success else f"reached {rollout.reached}"
        axis.set_title(f"{rollout.layout.target}: {outcome}", fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)
