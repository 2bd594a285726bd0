"""Test whether a policy uses its cameras, the instruction and the state, by open-loop evaluation with one replaced.

    python scripts/ablate.py --checkpoint runs/aloha [--frames 64] [--out runs/ablation]

Prints a table and writes OUT/ablation.json (errors per dimension and per step of the horizon) and OUT/ablation.png.
If replacing an input does not increase the error, the policy ignores it.
"""

import argparse
import json

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

from wallx_jax.evaluation import ablation, openloop, plots, target
from wallx_jax.utils.errors import run_main
from wallx_jax.utils.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target.add_arguments(parser)
    parser.add_argument("--frames", type=int, default=64, help="held-out frames, spread evenly")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps")
    parser.add_argument("--seed", type=int, default=0, help="seed for noise and ablations")
    parser.add_argument("--out", type=target.output_folder, default="runs/ablation")
    arguments = parser.parse_args()

    tested = target.load_eval_target(arguments)
    policy, names = tested.policy, tested.info.dim_names(tested.held_out.action_key)
    predicted = policy.processor.predicted
    recorded = openloop.read(tested.held_out, stride=1, limit=arguments.frames)
    chunks = {}
    tasks = list(tested.info.tasks.values())
    for name, change in ablation.changes(recorded, policy.processor, tasks, arguments.seed).items():
        seen = change(recorded.observations)
        chunk = openloop.predict(policy, seen, steps=arguments.steps, seed=arguments.seed)
        chunks[name] = ablation.from_true_states(chunk, seen, recorded, policy.processor)
    found = ablation.effects(recorded, chunks, predicted)

    arguments.out.mkdir(parents=True, exist_ok=True)
    plots.ablation(arguments.out / "ablation.png", found, names, predicted)
    result = {"checkpoint": str(tested.folder), "dataset": tested.info.repo_id, "frames": len(recorded)}
    result |= {"dims": names, "predicted": predicted.tolist(), "replaced": {}}
    for name, effect in found.items():
        row = effect.errors.as_json() | {"action_change": effect.action_change, "ratio": effect.ratio}
        result["replaced"][name] = row | ({} if name == "nothing" else {"verdict": ablation.verdict(effect)})
    write_text(arguments.out / "ablation.json", json.dumps(result, indent=2) + "\n")
    print(ablation.table(found))
    print(f"{len(recorded)} held-out frames; plot and metrics in {arguments.out}")


if __name__ == "__main__":
    run_main(main)
