"""Find the numerics that a checkpoint was trained with, by measuring both rotary layouts and both kinds of attention.

    python scripts/semantics.py --checkpoint x-square-robot/wall-oss-flow --config=configs/aloha.py
    python scripts/semantics.py --checkpoint DIR --dataset DIR_OR_REPO [--write]

Measures the flow loss (cross-entropy for a FAST checkpoint) and the open-loop error on held-out frames, with the same
noise, under each of the four combinations of mrope_layout and action_attention. The combination with the lowest loss
is chosen if it leads by two standard errors. --write records it in the checkpoint's configuration, so that inference
and training use it from then on.
"""

import argparse
import json
from pathlib import Path

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

from wallx_jax.data.pipeline import eval_batches
from wallx_jax.evaluation import numerics_search, openloop, target
from wallx_jax.utils.errors import run_main
from wallx_jax.utils.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target.add_arguments(parser)
    parser.add_argument("--batches", type=int, default=16, help="batches of frames for the losses")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--frames", type=int, default=32, help="frames for the open-loop error")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps")
    parser.add_argument("--write", action="store_true", help="record the combination that fits in the checkpoint")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    tested = target.load_eval_target(arguments)
    policy, source = tested.policy, tested.held_out
    batches = list(
        eval_batches(source, policy.processor, arguments.batch_size, arguments.batches * arguments.batch_size)
    )
    recorded = openloop.read(source, stride=1, limit=arguments.frames)
    found = numerics_search.measure(policy, batches, recorded, arguments.steps)
    decision = numerics_search.decide(found)

    print(numerics_search.table(found))
    print(decision.sentence())
    if policy.processor.config.objective == "fast":
        print("a FAST checkpoint has no action tokens that attend to each other: action_attention changes nothing")
    if arguments.json:
        figures = {"combinations": [m.as_json() for m in found], "best": decision.best.numerics,
                   "decided": not decision.rivals}  # fmt: skip
        write_text(arguments.json, json.dumps(figures, indent=2) + "\n")
    if arguments.write and decision.rivals:
        raise ValueError("not written: undecided. More --batches may tell")
    if arguments.write:
        print(f"recorded in {numerics_search.write_numerics(tested.folder, decision.best.numerics)}")


if __name__ == "__main__":
    run_main(main)
