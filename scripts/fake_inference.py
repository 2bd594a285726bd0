"""Smoke-test a weights directory with synthetic images, state and text; report shapes, finiteness and timings.

    python scripts/fake_inference.py --model DIR_OR_REPO [--json OUT]

A Wall-X directory or a wallx_jax checkpoint predicts an action chunk (by flow matching, unless it was trained with
FAST) and generates some text; a Qwen2.5-VL directory generates text only. Needs neither a dataset nor a robot's
statistics, and does not measure how good the policy is. Exit code 1 if anything is not finite.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

from wallx_jax.checkpoints.source import ModelSource, open_source
from wallx_jax.data.normalize import NormStats, Stats
from wallx_jax.inference.load import load_policy, load_vlm
from wallx_jax.inference.policy import ActionNotFiniteError, Policy
from wallx_jax.inference.sampler import LogitsError
from wallx_jax.inference.vlm import VLM
from wallx_jax.models.config import WallXConfig
from wallx_jax.utils import tree
from wallx_jax.utils.errors import run_main
from wallx_jax.utils.files import write_text

CAMERA = (480, 640)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub repo id")
    parser.add_argument("--batch", type=int, default=1, help="observations per call")
    parser.add_argument("--horizon", type=int, default=32, help="actions per chunk, for a model directory")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of text")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; the fastest is printed")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    figures = smoke(arguments)
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        write_text(arguments.json, text + "\n")
    sys.exit(0 if figures["finite"] else 1)


def smoke(arguments: argparse.Namespace) -> dict:
    source = open_source(arguments.model)
    folder = source.folder
    start = time.perf_counter()
    has_actions = source.read_config().has_action_head
    policy = _policy(source, arguments.horizon) if has_actions else None
    vlm = VLM(policy.config, policy.params, policy.processor.tokenizer) if has_actions else load_vlm(folder)
    loaded = time.perf_counter() - start
    figures = {"model": str(folder), "device": jax.devices()[0].device_kind, "load_s": loaded}
    figures |= {
        **_size(vlm.config, vlm.params),
        "finite": True,
    }  # weights that are not finite are rejected when they are loaded
    try:
        if has_actions and policy.processor.config.objective == "flow":
            figures |= _act(policy, arguments)
        image = np.random.default_rng(0).integers(0, 256, (*CAMERA, 3), np.uint8)
        answer, figures["text_ms"] = _timed(
            lambda: vlm.ask("What is in the image?", image, max_tokens=arguments.max_tokens), arguments.repeats
        )
        figures |= {"text_tokens": len(answer.tokens), "text": answer.text}
    except (ActionNotFiniteError, LogitsError) as error:
        figures |= {"finite": False, "error": str(error)}
    return figures


def _act(policy: Policy, arguments: argparse.Namespace) -> dict:
    rng = np.random.default_rng(0)
    observation = {
        "images": {view: rng.integers(0, 256, (*CAMERA, 3), np.uint8) for view in policy.processor.config.views},
        "state": policy.processor.state.unnormalize(rng.uniform(-1, 1, policy.processor.state.dims)),
        "instruction": "pick up the red block",
    }
    batch = [observation] * arguments.batch
    chunk, times = _timed(lambda: policy.predict(batch, steps=arguments.steps).actions, arguments.repeats)
    return {"chunk_ms": times, "actions": list(chunk.shape)}


def _policy(source: ModelSource, horizon: int) -> Policy:
    if source.has_processor:
        return load_policy(source.folder)
    action = source.read_config().action
    stats = NormStats(_unit(action.state_dim), _unit(action.action_dim), "state", "action")
    return load_policy(source.folder, norm_stats=stats, horizon=horizon)


def _unit(dims: int) -> Stats:
    """Return statistics under which normalization is the identity."""
    one = np.ones(dims)
    return Stats(mean=0 * one, std=one, q01=-one, q99=one, min=-one, max=one)


def _size(config: WallXConfig, params: tree.Tree) -> dict:
    leaves = tree.flatten(params).values()
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "gib": sum(leaf.nbytes for leaf in leaves) / 2**30,
        "dtype": config.numerics.param_dtype,
        "layers": config.text.num_hidden_layers,
        "vocabulary": config.text.vocab_size,
    }


def _timed(call, repeats: int):
    """Return (result, {"first": time with compilation, "best": best time of the others}) in milliseconds."""
    times, result = [], None
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = call()
        times.append(1e3 * (time.perf_counter() - start))
    return result, {"first": times[0], "best": min(times[1:], default=times[0])}


if __name__ == "__main__":
    run_main(main)
