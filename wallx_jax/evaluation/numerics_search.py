"""Find the numerics under which a checkpoint fits its data best, by losses and open-loop errors on the same frames.

Upstream's own default path (causal action tokens, its kernel's rotary layout), transformers and lerobot disagree, and
it is not documented which one the published weights were trained with. It can only be measured. Frames and noise are
the same under all combinations.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wallx_jax.checkpoints.layout import metadata_file
from wallx_jax.data.batch import EvalBatch
from wallx_jax.evaluation import openloop
from wallx_jax.evaluation.openloop import Recorded
from wallx_jax.inference.policy import Policy
from wallx_jax.training.step import EVAL_SEED, Objective, make_eval_step
from wallx_jax.utils.files import atomic_file, read_json_object

COMBINATIONS = tuple(
    {"mrope_layout": layout, "action_attention": attention}
    for layout, attention in itertools.product(("qwen", "upstream_cuda"), ("bidirectional", "causal"))
)
DECIDES = 2.0  # the best combination must lead by this many standard errors


@dataclass(frozen=True)
class Measurement:
    """Losses and open-loop error under one combination of numerics.

    Attributes:
        numerics: fields of models.config.Numerics and their values.
        flow_losses: one per batch; NaN for a FAST checkpoint.
        cross_entropies: one per batch; NaN for a flow-matching checkpoint.
        open_loop: mean absolute error in robot units.
    """

    numerics: dict[str, str]
    flow_losses: np.ndarray
    cross_entropies: np.ndarray
    open_loop: float

    @property
    def name(self) -> str:
        return "mrope_layout={mrope_layout} action_attention={action_attention}".format(**self.numerics)

    def as_json(self) -> dict[str, Any]:
        def mean(x: np.ndarray) -> float | None:
            return None if np.isnan(x).all() else float(x.mean())

        return {
            **self.numerics,
            "flow_loss": mean(self.flow_losses),
            "cross_entropy_loss": mean(self.cross_entropies),
            "open_loop_mae": None if np.isnan(self.open_loop) else self.open_loop,
        }


def measure(policy: Policy, batches: Sequence[EvalBatch], recorded: Recorded, steps: int = 10) -> list[Measurement]:
    """Measure every combination on the same batches and recorded frames.

    Args:
        policy: the policy to evaluate.
        batches: batches with actions and labels.
        recorded: frames for the open-loop error.
        steps: number of Euler steps of the flow.

    Returns:
        one measurement per entry of COMBINATIONS.
    """
    is_fast = policy.processor.config.objective == "fast"
    found = []
    for numerics in COMBINATIONS:
        config = policy.config.replace(numerics=numerics)
        evaluate = jax.jit(make_eval_step(config, Objective(use_flow=not is_fast), EVAL_SEED))
        losses = []
        for batch in batches:
            sums, counts = jax.device_get(evaluate(policy.params, batch))
            losses.append(sums.cross_entropy / counts.cross_entropy if is_fast else sums.flow / counts.flow)
        loss, none = np.array(losses, np.float64), np.full(len(losses), np.nan)
        actor = Policy(config, policy.params, policy.processor)
        chunks = openloop.predict(actor, recorded.observations, steps=steps)
        error = openloop.errors(chunks, recorded, policy.processor.predicted).mean
        found.append(Measurement(numerics, none if is_fast else loss, loss if is_fast else none, error))
    return found


@dataclass(frozen=True)
class Decision:
    """Outcome of the search.

    Attributes:
        best: the combination with the lowest loss.
        rivals: combinations whose loss does not differ significantly from the best.
    """

    best: Measurement
    rivals: list[Measurement]

    def sentence(self) -> str:
        if not self.rivals:
            return f"{self.best.name} fits best"
        others = "; ".join(rival.name for rival in self.rivals)
        return (
            f"undecided: {self.best.name} has the lowest loss, but within {DECIDES:g} standard errors of it: {others}"
        )


def decide(found: Sequence[Measurement]) -> Decision:
    """Choose the combination with the lowest loss (flow loss, or cross-entropy for a FAST checkpoint).

    Batches are shared, so combinations are compared batch by batch: a rival's loss exceeds the best one's by at most
    DECIDES standard errors of the mean difference.
    """
    losses = [m.cross_entropies if np.isnan(m.flow_losses).all() else m.flow_losses for m in found]
    best = int(np.argmin([loss.mean() for loss in losses]))
    rivals = []
    for index, loss in enumerate(losses):
        difference = loss - losses[best]
        error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else np.inf
        if index != best and difference.mean() <= DECIDES * error:
            rivals.append(found[index])
    return Decision(found[best], rivals)


def table(found: Sequence[Measurement]) -> str:
    """Format the measurements as a text table."""
    lines = [
        f"{'mrope_layout':14} {'action_attention':17} {'flow loss':>10} {'cross-entropy':>14} {'open-loop MAE':>14}"
    ]
    for m in found:
        numbers = [m.flow_losses.mean(), m.cross_entropies.mean(), m.open_loop]
        shown = ["-" if np.isnan(x) else f"{x:.5g}" for x in numbers]
        lines.append(
            f"{m.numerics['mrope_layout']:14} {m.numerics['action_attention']:17} {shown[0]:>10} {shown[1]:>14} "
            f"{shown[2]:>14}"
        )
    return "\n".join(lines)


def write_numerics(folder: Path, numerics: dict[str, str]) -> Path:
    """Write numerics to the configuration of a checkpoint (metadata.json) or model directory (config.json), atomically.

    Returns:
        the file that was changed.

    Raises:
        ValueError: the folder is in the hub's cache, which all programs share.
    """
    file = folder / "config.json"
    if file.is_file():
        if file.is_symlink():
            raise ValueError(f"{file} is a link into the shared Hub cache; copy the directory first")
        content = read_json_object(file)
        content["wallx_jax"] = {**content.get("wallx_jax", {}), **numerics}
    else:
        file = metadata_file(folder)
        content = read_json_object(file)
        content["numerics"] |= numerics
        content["model"]["wallx_jax"] |= numerics
    with atomic_file(file) as out:
        out.write(json.dumps(content, indent=2).encode() + b"\n")
    return file
