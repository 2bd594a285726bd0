"""Plot a policy's predictions on held-out episodes, and compare its errors with baselines that need no model.

    python scripts/openloop_plot.py --checkpoint runs/aloha [--episodes 3] [--out runs/openloop]
    python scripts/openloop_plot.py --checkpoint DIR_OR_REPO --config=configs/aloha.py

Writes OUT/episode_E.png (recorded and predicted actions per dimension) for each episode, and OUT/openloop.json with the
mean absolute errors per dimension and per step of the horizon, in robot units, of the policy, of holding still and of
the mean action.
"""

import argparse
import json

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

from wallx_jax.evaluation import openloop, plots, target
from wallx_jax.utils.errors import run_main
from wallx_jax.utils.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target.add_arguments(parser)
    parser.add_argument("--episodes", type=int, default=3, help="held-out episodes, from the first on")
    parser.add_argument("--stride", type=int, help="frames between predictions; default: the horizon")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=target.output_folder, default="runs/openloop")
    arguments = parser.parse_args()

    tested = target.load_eval_target(arguments)
    policy, names = tested.policy, tested.info.dim_names(tested.held_out.action_key)
    stride = arguments.stride or policy.processor.config.horizon
    recorded = openloop.read(tested.held_out, stride, arguments.episodes)
    chunks = openloop.predict(policy, recorded.observations, steps=arguments.steps, seed=arguments.seed)

    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"checkpoint": str(tested.folder), "dataset": tested.info.repo_id, "stride": stride}
    result |= openloop.report(chunks, recorded, policy.processor, names) | {"per_episode": {}}
    for episode in result["episodes"]:
        rows, part = recorded.episodes == episode, recorded.of_episode(episode)
        score = openloop.errors(chunks[rows], part, policy.processor.predicted)
        result["per_episode"][episode] = score.as_json()
        title = f"episode {episode}: {part.observations[0]['instruction']} (mean absolute error {score.mean:.4g})"
        file = arguments.out / f"episode_{episode}.png"
        plots.episode(file, part, chunks[rows], names, policy.processor.predicted, title)
    write_text(arguments.out / "openloop.json", json.dumps(result, indent=2) + "\n")
    for name in ("policy", "hold_still", "mean_action"):
        error = result[name]["mae"]  # None where no frame has a prediction
        print(f"{name:12} mean absolute error {'-' if error is None else f'{error:.4g}'}")
    if failed := result["policy"]["failed_frames"]:
        print(
            f"{failed} of {len(recorded)} frames have no prediction: what the policy gave is no chunk of finite actions"
        )
    print(f"{len(recorded)} chunks of {len(result['episodes'])} episodes; plots and openloop.json in {arguments.out}")


if __name__ == "__main__":
    run_main(main)
