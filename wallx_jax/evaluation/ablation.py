"""Does a policy use what it is given? Open loop with one input at a time replaced.

Legend: N frames, A action horizon, D robot dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wallx_jax.data.processor import Processor
from wallx_jax.evaluation.openloop import Errors, Recorded, errors
from wallx_jax.inference.policy import Observation

FOREIGN = "wave at the camera"  # the other instruction, for a dataset that has one only
Change = Callable[[Sequence[Observation]], list[Observation]]


def changes(recorded: Recorded, processor: Processor, tasks: Sequence[str], seed: int = 0) -> dict[str, Change]:
    """{what is replaced: observations -> changed observations}, the unchanged ones first.

    "images noise": independent uniform pixels. "images of another episode": of the frame half of all frames further
    on, or behind it the first of another episode; left out when all frames are of one episode. "instruction swapped":
    another task of the dataset, or FOREIGN. "state zeroed": the middle of every dim's range, which the model sees as 0.
    """
    rng = np.random.default_rng(seed)

    def noise(observations):
        return [
            o | {"images": {key: rng.integers(0, 256, image.shape, np.uint8) for key, image in o["images"].items()}}
            for o in observations
        ]

    def other_images(observations):
        return [o | {"images": observations[_elsewhere(recorded, i)]["images"]} for i, o in enumerate(observations)]

    def swapped(observations):
        return [o | {"instruction": other_task(o["instruction"], tasks, rng)} for o in observations]

    middle = processor.state.unnormalize(np.zeros(processor.state.width))

    def zeroed(observations):
        return [o | {"state": middle} for o in observations]

    found: dict[str, Change] = {"nothing": list, "images noise": noise}
    if len(set(recorded.episodes.tolist())) > 1:
        found["images of another episode"] = other_images
    return found | {"instruction swapped": swapped, "state zeroed": zeroed}


def other_task(task: str, tasks: Sequence[str], rng: np.random.Generator) -> str:
    """One of the dataset's other tasks."""
    others = [other for other in tasks if other != task and other.strip()]
    return str(rng.choice(others)) if others else FOREIGN


def _elsewhere(recorded: Recorded, row: int) -> int:
    """A frame of another episode."""
    count = len(recorded)
    return next(
        other
        for other in ((row + count // 2 + step) % count for step in range(count))
        if recorded.episodes[other] != recorded.episodes[row]
    )


def from_true_states(
    chunks: np.ndarray, seen: Sequence[Observation], recorded: Recorded, processor: Processor
) -> np.ndarray:
    """Chunks [N, A, D] that a policy predicted for the observations `seen`, carried out where the robot was: actions
    that are relative to the state are added to the recorded one, not to what replaced it."""
    was, saw = (processor.reference(np.stack([o["state"] for o in each])) for each in (recorded.observations, seen))
    return chunks + (was - saw)[:, None]


@dataclass(frozen=True)
class Effect:
    """errors: of the predictions with this input replaced. moved: mean absolute change of the predicted actions, over
    predicted dims, in robot units. ratio: error over the error with nothing replaced."""

    errors: Errors
    moved: float
    ratio: float


def effects(recorded: Recorded, chunks: dict[str, np.ndarray], predicted: np.ndarray) -> dict[str, Effect]:
    """What each replacement does; `chunks`: predictions [N, A, D] by replacement, with "nothing" among them."""
    intact = chunks["nothing"]
    base = errors(intact, recorded, predicted)
    found = {}
    for name, each in chunks.items():
        error = errors(each, recorded, predicted)
        moved = float(np.nanmean(np.abs(each - intact)[..., predicted]))
        found[name] = Effect(error, moved, error.mean / base.mean if base.mean else float("nan"))
    return found


def verdict(effect: Effect, threshold: float = 1.05) -> str:
    """In words: does replacing this input make predictions worse?"""
    if effect.moved == 0:
        return "has no effect at all"
    return "used" if effect.ratio >= threshold else "hardly used"


def table(found: dict[str, Effect]) -> str:
    """The effects as people read them."""
    width = max(map(len, found))
    lines = [f"{'replaced':{width}}  {'error':>10}  {'x intact':>9}  {'actions move by':>15}"]
    for name, effect in found.items():
        line = f"{name:{width}}  {effect.errors.mean:10.4g}  {effect.ratio:9.2f}  {effect.moved:15.4g}"
        lines.append(line if name == "nothing" else f"{line}  {verdict(effect)}")
    return "\n".join(lines)
