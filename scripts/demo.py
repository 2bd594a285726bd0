"""Run the whole workflow on the CPU: record demonstrations, train a tiny Wall-X from scratch, evaluate it.

    python scripts/demo.py [--workdir runs/demo] [--episodes 1500] [--steps N]

Four steps, each an ordinary command or library call: write a LeRobot dataset and an untrained model, train with
`python -m wallx_jax.train --config=configs/demo.py`, compare with held-out episodes, run closed loop in the simulator.
Prints a table and writes the results to results.json and demo.png in WORKDIR.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from wallx_jax.utils import extras
from wallx_jax.utils.files import write_text

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--episodes", type=int, default=1500, help="demonstrations in the dataset")
    parser.add_argument("--steps", type=int, help="optimizer updates; default: configs/demo.py's")
    args = parser.parse_args()
    extras.require("train", __name__)
    start = time.perf_counter()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the hub
    model, dataset, run, cache = (args.workdir / name for name in ("model", "dataset", "run", "cache"))
    for folder in (model, dataset, run, cache):
        shutil.rmtree(folder, ignore_errors=True)
    args.workdir.mkdir(parents=True, exist_ok=True)

    say(start, f"recording {args.episodes} demonstrations in {dataset}")
    in_process(write_dataset, dataset, args.episodes)
    in_process(write_model, model)

    say(start, "training")
    overrides = {"pretrained_wallx_path": model, "repo_id": dataset, "frame_cache": cache}
    if args.steps:
        overrides["num_training_steps"] = args.steps
    command = [sys.executable, "-m", "wallx_jax.train", f"--config={ROOT / 'configs/demo.py'}", f"--workdir={run}"]
    subprocess.run([*command, *(f"--config.{key}={value}" for key, value in overrides.items())], check=True)

    say(start, "evaluating")
    results = evaluate(model, run, args.workdir / "demo.png")
    results["minutes"] = (time.perf_counter() - start) / 60
    write_text(args.workdir / "results.json", json.dumps(results, indent=2) + "\n")
    print(table(results))
    say(start, f"done; see {args.workdir / 'demo.png'}")


def say(start: float, what: str) -> None:
    print(f"[{time.perf_counter() - start:4.0f} s] {what}", flush=True)


def in_process(work: Callable[..., None], *args) -> None:
    """Run `work(*args)` in a process of its own, whose memory is free afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def write_dataset(folder: Path, episodes: int) -> None:
    from tabletop import assets

    assets.write_dataset(folder, episodes, progress=True)


def write_model(folder: Path) -> None:
    from tabletop import assets

    assets.write_model(folder)


def evaluate(model: Path, run: Path, figure: Path) -> dict:
    """Evaluate errors and success rates of the trained policy, also with inputs blanked, and of the untrained one."""
    # Imported only after the earlier commands have finished, since they need the memory that it would take.
    from tabletop import evaluate as ev
    from tqdm import tqdm

    from wallx_jax.evaluation import openloop
    from wallx_jax.evaluation.target import load_eval_target
    from wallx_jax.inference.policy import Policy
    from wallx_jax.weights.load import load_params

    subject = load_eval_target(argparse.Namespace(checkpoint=run, dataset=None, robot=None, config=None))
    policy = subject.policy
    untrained = Policy(policy.config, load_params(model, numerics={"param_dtype": "float32"})[1], policy.processor)
    recorded = openloop.read(subject.held_out, stride=1)
    layouts = ev.test_layouts(LAYOUTS)
    cases = {f"{name} blank" if name != "nothing" else "trained": (policy, blank)
             for name, blank in ev.blanks(policy).items()}  # fmt: skip
    cases["untrained"] = untrained, ev.blanks(policy)["nothing"]

    def error(chunks) -> float:
        return openloop.errors(chunks, recorded, policy.processor.predicted).mean

    open_loop, closed_loop, kept = {}, {}, {}
    open_loop["hold still"] = error(openloop.baselines(recorded, policy.processor)["hold_still"])
    bar = tqdm(cases.items(), desc="evaluating", unit="policy")
    for name, (actor, blank) in bar:
        bar.set_postfix_str(name)
        chunks = openloop.predict(actor, [blank(o) for o in recorded.observations], ev.BATCH)
        rollouts = ev.roll_out(actor, layouts, blank)
        kept[name] = chunks, rollouts
        open_loop[name] = error(chunks)
        closed_loop[name] = {
            "named": ev.rate(r.success for r in rollouts),
            "other": ev.rate(r.wrong for r in rollouts),
        }
    results = {"open_loop": open_loop, "closed_loop": closed_loop, "held_out_frames": len(recorded)}
    ev.plot(figure, recorded, *kept["trained"], results)
    return results


def table(results: dict) -> str:
    """Format the results as a text table."""
    lines = [
        "",
        f"{'':16}{'open loop':>12}{'closed loop, ' + str(LAYOUTS) + ' layouts':>32}",
        f"{'':16}{'mean error':>12}{'named block':>16}{'another block':>16}",
    ]
    for name, error in results["open_loop"].items():
        line = f"{name:16}{error:12.4f}"
        if case := results["closed_loop"].get(name):
            line += f"{case['named']:16.0%}{case['other']:16.0%}"
        lines.append(line)
    share = results["open_loop"]["trained"] / results["open_loop"]["hold still"]
    lines += [
        "",
        f"open-loop error is {share:.0%} of holding still (radians and gripper units, mean over 14 dimensions)",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
