"""Measure which inputs a policy uses, by open-loop evaluation with one input at a time replaced.

Legend: N frames, A action horizon, D robot dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wallx_jax.data.processor import Processor
from wallx_jax.evaluation.openloop import Errors, Recorded, errors
from wallx_jax.inference.policy import Observation

FOREIGN = "wave at the camera"  # replacement instruction for datasets with only one
Change = Callable[[Sequence[Observation]], list[Observation]]


def changes(recorded: Recorded, processor: Processor, tasks: Sequence[str], seed: int = 0) -> dict[str, Change]:
    """Build the ablations of the recorded observations.

    Returns:
        {name: observations -> changed observations}, in this order:
        "nothing": the observations as recorded.
        "images noise": independent uniform pixels.
        "images of another episode": those of the frame N / 2 frames ahead (wrapping around), or of the first frame
            after it that belongs to another episode; absent if all frames are from one episode.
        "instruction swapped": another task of the dataset, or FOREIGN if there is none.
        "state zeroed": the middle of every dim's range, which the model sees as 0.
    """
    rng = np.random.default_rng(seed)

    def noise(observations: Sequence[Observation]) -> list[Observation]:
        return [
            {**o, "images": {key: rng.integers(0, 256, image.shape, np.uint8) for key, image in o["images"].items()}}
            for o in observations
        ]

    def other_images(observations: Sequence[Observation]) -> list[Observation]:
        return [{**o, "images": observations[_elsewhere(recorded, i)]["images"]} for i, o in enumerate(observations)]

    def swapped(observations: Sequence[Observation]) -> list[Observation]:
        return [{**o, "instruction": other_task(o["instruction"], tasks, rng)} for o in observations]

    middle = processor.state.unnormalize(np.zeros(processor.state.width))

    def zeroed(observations: Sequence[Observation]) -> list[Observation]:
        return [{**o, "state": middle} for o in observations]

    found: dict[str, Change] = {"nothing": list, "images noise": noise}
    if len(set(recorded.episodes.tolist())) > 1:
        found["images of another episode"] = other_images
    return found | {"instruction swapped": swapped, "state zeroed": zeroed}


def other_task(task: str, tasks: Sequence[str], rng: np.random.Generator) -> str:
    """Draw one of the dataset's other non-empty tasks; FOREIGN if there is none."""
    others = [other for other in tasks if other != task and other.strip()]
    return str(rng.choice(others)) if others else FOREIGN


def _elsewhere(recorded: Recorded, row: int) -> int:
    """Return the row of a frame from another episode."""
    count = len(recorded)
    return next(
        other
        for other in ((row + count // 2 + step) % count for step in range(count))
        if recorded.episodes[other] != recorded.episodes[row]
    )


def from_true_states(
    chunks: np.ndarray, seen: Sequence[Observation], recorded: Recorded, processor: Processor
) -> np.ndarray:
    """Re-anchor predicted chunks [N, A, D] at the recorded states.

    The policy adds relative actions to the state in `seen`, which an ablation may have replaced; here they are added to
    the recorded state instead.
    """
    was, saw = (processor.reference(np.stack([o["state"] for o in each])) for each in (recorded.observations, seen))
    return chunks + (was - saw)[:, None]


@dataclass(frozen=True)
class Effect:
    """Effect of replacing one input.

    Attributes:
        errors: errors of the predictions with this input replaced.
        action_change: mean absolute change of the predicted actions over predicted dims, in robot units.
        ratio: mean error divided by the mean error with nothing replaced.
    """

    errors: Errors
    action_change: float
    ratio: float


def effects(recorded: Recorded, chunks: dict[str, np.ndarray], predicted: np.ndarray) -> dict[str, Effect]:
    """Compute the effect of each replacement.

    Args:
        recorded: the recorded frames.
        chunks: {replacement: predictions [N, A, D]}, including "nothing".
        predicted: bool [D], dims that the policy predicts.
    """
    intact = chunks["nothing"]
    base = errors(intact, recorded, predicted)
    found = {}
    for name, each in chunks.items():
        error = errors(each, recorded, predicted)
        action_change = float(np.nanmean(np.abs(each - intact)[..., predicted]))
        found[name] = Effect(error, action_change, error.mean / base.mean if base.mean else float("nan"))
    return found


def verdict(effect: Effect, threshold: float = 1.05) -> str:
    """Describe whether the policy uses an input, i.e. whether replacing it makes predictions worse."""
    if effect.action_change == 0:
        return "no effect"
    return "used" if effect.ratio >= threshold else "hardly used"


def table(found: dict[str, Effect]) -> str:
    """Format the effects as a text table."""
    width = max(map(len, found))
    lines = [f"{'replaced':{width}}  {'error':>10}  {'x intact':>9}  {'action change':>15}"]
    for name, effect in found.items():
        line = f"{name:{width}}  {effect.errors.mean:10.4g}  {effect.ratio:9.2f}  {effect.action_change:15.4g}"
        lines.append(line if name == "nothing" else f"{line}  {verdict(effect)}")
    return "\n".join(lines)
