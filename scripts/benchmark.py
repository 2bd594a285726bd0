"""Time one train step and one action chunk, or compute the memory of a full-size train step without running it.

    python scripts/benchmark.py --preset mid [--batch 1] [--what train chunk parts] [--json OUT]
    python scripts/benchmark.py --preset mid --compare-torch [--json OUT]
    python scripts/benchmark.py --preset wall_oss_3b --aot --target h200 --devices 8 [--json OUT]

Each sample has three 252x196 images and 285 tokens, 32 of them action tokens. Weights are random: speed does not depend
on them. Prints JSON. `--what` selects a train step (train), the single program that a policy runs (chunk), and its
stages (parts): vision (images to features), prefix (prompt to keys and values) and denoise (one Euler step); token_ms
is the time per token of text or of FAST actions.

`--compare-torch` runs lerobot's PyTorch wall_x and this package alternately on the same weights and inputs, a chunk and
a train step, and compares the actions; `make torch-reference` creates its environment.

`--aot` compiles for N devices with parameters sharded over fsdp, and prints the compiler's bytes per device.
`--target h100` and `h200` need the GPU compiler that comes with `jax[cuda12]`, but no GPU. The CPU compiler keeps some
bfloat16 arrays in float32, so its figures are upper bounds for an accelerator.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import aot

ACTIONS, TOKENS, IMAGE, CAMERAS, STEPS = 32, 285, (196, 252), 3, 10
WHAT = ("train", "chunk", "parts")
GENERATED = 32  # generated tokens of text, or of FAST actions


def random_batch(model, batch: int):
    """Return a batch of random pixels and tokens in the layout of three cameras and one state token."""
    import numpy as np

    from wallx_jax.data.batch import Batch

    rng, ids, action = np.random.default_rng(0), model.tokens, model.action
    length, image_tokens = TOKENS - ACTIONS, IMAGE[0] * IMAGE[1] // 28**2
    tokens = rng.integers(0, min(ids.image, 1000), (batch, length))
    for camera in range(CAMERAS):
        start = 16 + camera * (image_tokens + 4)
        tokens[:, start - 1] = ids.vision_start
        tokens[:, start : start + image_tokens] = ids.image
    tokens[:, -8] = ids.propri
    actions = rng.uniform(-1, 1, (batch, ACTIONS, action.action_dim)).astype(np.float32)
    state = rng.uniform(-1, 1, (batch, action.state_dim)).astype(np.float32)
    return Batch(
        images=tuple(rng.integers(0, 256, (batch, *IMAGE, 3), dtype=np.uint8) for _ in range(CAMERAS)),
        tokens=tokens.astype(np.int32),
        token_mask=np.ones(tokens.shape, bool),
        labels=np.zeros((batch, 0), np.int32),
        state=state,
        state_mask=np.ones_like(state),
        actions=actions,
        action_mask=np.ones_like(actions),
        action_is_pad=np.zeros(actions.shape[:2], bool),
    )


def median_ms(call, repeats: int) -> float:
    """Return the median wall time of a call in milliseconds, after one warm-up call."""
    import jax
    import numpy as np

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


def train_step_of(model, name: str = "adamw", freeze_vlm: bool = False):
    """Return (optimizer, train step) with the defaults of a run."""
    from wallx_jax.config import default_config, resolve
    from wallx_jax.training.optimizer import make_optimizer
    from wallx_jax.training.step import Objective, make_train_step

    c = default_config()
    c.pretrained_wallx_path = c.repo_id = c.save_path = "unused"
    c.camera_views = {"face_view": "unused"}
    c.optimizer, c.freeze_vlm = name, freeze_vlm
    optimizer = make_optimizer(dataclasses.replace(resolve(c).optim, lora=model.lora), 1000)
    return optimizer, make_train_step(model, optimizer, Objective(), seed=0)


def time_chunk(model, params, batch, repeats: int) -> dict:
    """Measure the latency of an action chunk, with unrolled layers as in a policy."""
    noise, start = noise_for(batch), time.perf_counter()
    chunk = chunk_program(model, params, batch, noise)
    compile_s = time.perf_counter() - start
    return {
        "chunk_ms": median_ms(lambda: chunk(params, batch, noise), repeats),
        "euler_steps": STEPS,
        "chunk_compile_s": compile_s,
    }


def time_parts(model, params, batch, repeats: int) -> dict:
    """Measure the latency of the stages of a chunk and of a token of text, with unrolled layers as in a policy."""
    import jax

    from wallx_jax.models import flow
    from wallx_jax.models.generate import generate
    from wallx_jax.models.params import from_params
    from wallx_jax.models.vision import visual_grid

    noise = noise_for(batch)
    grids = tuple(visual_grid(image, model.vision) for image in batch.images)

    def vision(params, batch):
        return from_params(model, params).encode_images(batch.images)[0]

    def prefix(params, batch, features):
        net = from_params(model, params)
        prompt = net.embed_prefix(batch.tokens, batch.token_mask, features, grids, batch.state, batch.state_mask)
        return net.encode_prefix(prompt, cache_length=TOKENS)[0]

    def denoise(params, cache, noise, mask):  # all steps in one program, as in a chunk: no copies between steps
        net, times = from_params(model, params), flow.euler_times(STEPS)
        return flow.integrate(
            lambda x, time_emb, kv: net.suffix_velocity(cache._replace(kv=kv), x, mask, time_emb[None]),
            noise,
            times,
            net.action.embed_time(times[:-1]),
            cache.kv,
            mask,
            model.numerics.masked_dims,
        )

    def generate_text(count, params, batch):
        net = from_params(model, params)
        return generate(net, net.embed_batch(batch), count)

    generate_one, generate_more = (jax.jit(functools.partial(generate_text, count)) for count in (1, 1 + GENERATED))
    vision, prefix, denoise = map(jax.jit, (vision, prefix, denoise))
    features = vision(params, batch)
    cache = prefix(params, batch, features)
    times = {
        "vision_ms": median_ms(lambda: vision(params, batch), repeats),
        "prefix_ms": median_ms(lambda: prefix(params, batch, features), repeats),
        "denoise_step_ms": median_ms(lambda: denoise(params, cache, noise, batch.action_mask), repeats) / STEPS,
    }
    one, more = (
        median_ms(lambda program=program: program(params, batch), repeats) for program in (generate_one, generate_more)
    )
    return times | {
        "token_ms": (more - one) / GENERATED,
        "denoise_step_over_prefix": times["denoise_step_ms"] / times["prefix_ms"],
    }


def noise_for(batch):
    import jax

    return jax.random.normal(jax.random.key(1), batch.actions.shape)


def chunk_program(model, params, batch, noise):
    """Compile the program of a policy: images, prompt and noise to a chunk of actions."""
    import jax

    from wallx_jax.models.params import from_params

    def chunk(params, batch, noise):
        net = from_params(model, params)
        return net.sample_actions(net.embed_batch(batch), noise, batch.action_mask, STEPS)

    return jax.jit(chunk).lower(params, batch, noise).compile()


class TorchReference:
    """A subprocess that runs scripts/bench/torch_reference.py in its own environment.

    Args:
        python: interpreter of that environment.
        folder: Wall-X directory with the weights of `model`.
        model: its configuration.
        batch: inputs.
        noise: initial noise of the flow.
    """

    def __init__(self, python: Path, folder: Path, model, batch, noise):
        import jax.numpy as jnp
        import numpy as np

        from wallx_jax.models.vision import patchify, visual_grid

        if not python.is_file():
            raise SystemExit(f"error: no PyTorch environment at {python}; set it up with: make torch-reference")
        behind = ((0, 0), (0, noise.shape[1]))
        ids = np.pad(batch.tokens, behind, constant_values=model.tokens.action)
        patches = jnp.concatenate([patchify(jnp.asarray(image), model.vision) for image in batch.images], axis=1)
        grids = [visual_grid(image, model.vision) for image in batch.images] * len(ids)
        np.savez(
            folder / "inputs.npz",
            input_ids=ids.astype(np.int64),
            attention_mask=np.pad(batch.token_mask, behind, constant_values=True).astype(np.int64),
            moe_token_types=(ids == model.tokens.action).astype(np.int64),
            pixel_values=np.asarray(patches).reshape(-1, model.vision.patch_dim),
            image_grid_thw=np.array(grids),
            proprioception=batch.state[:, None],
            agent_pos_mask=batch.state_mask[:, None],
            dof_mask=batch.action_mask,
            action_chunk=batch.actions,
            noise=np.asarray(noise),
            tokens=json.dumps({name: getattr(model.tokens, name) for name in ("propri", "action")}),
        )
        worker = Path(__file__).parent / "bench/torch_reference.py"
        command = [str(python), str(worker), str(folder), str(folder / "inputs.npz")]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        self._log = (folder / "log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.versions = self._read()

    def __call__(self, command: str) -> dict:
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the PyTorch reference failed: {Path(self._log.name).read_text('utf-8')[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def compare(model, params, batch, scan_layers: bool, python: Path, repeats: int) -> dict:
    """Time chunks, then train steps, of this package and of lerobot alternately, after one warm-up run of each."""
    import jax
    import numpy as np

    from wallx_jax.models.scan import unstack_layers
    from wallx_jax.weights.export import save_directory

    noise = noise_for(batch)
    with tempfile.TemporaryDirectory() as folder:
        save_directory(folder, model, params)
        theirs = TorchReference(python, Path(folder), model, batch, noise)
        unrolled, on_device = unstack_layers(params), jax.device_put(batch)
        ours = chunk_program(model, unrolled, on_device, noise)
        times: dict[str, list[float]] = {name: [] for name in ("ours", "torch", "ours_train", "torch_train")}
        for _ in range(repeats + 1):
            start = time.perf_counter()
            actions = np.asarray(ours(unrolled, on_device, noise))
            times["ours"].append(1e3 * (time.perf_counter() - start))
            times["torch"].append(theirs(f"chunk {STEPS}")["ms"])
        expected = np.array(theirs("actions")["actions"])
        del unrolled
        train_one = train_program(model, params, on_device, scan_layers)
        for _ in range(repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(train_one())
            times["ours_train"].append(1e3 * (time.perf_counter() - start))
            times["torch_train"].append(theirs("train")["ms"])
        versions = theirs.versions
        theirs.close()
    medians = {name: float(np.median(each[1:])) for name, each in times.items()}
    return {
        "ours_ms": medians["ours"],
        "torch_ms": medians["torch"],
        "speedup": medians["torch"] / medians["ours"],
        "largest_difference": float(np.abs(actions - expected).max()),
        "largest_action": float(np.abs(expected).max()),
        "ours_train_ms": medians["ours_train"],
        "torch_train_ms": medians["torch_train"],
        "train_speedup": medians["torch_train"] / medians["ours_train"],
        **versions,
    }


def train_program(model, params, batch, scan_layers: bool):
    """Return a function that makes one update and returns its loss; its `compile_s` is the compilation time."""
    import jax

    from wallx_jax.models.scan import unstack_layers
    from wallx_jax.training.state import create_state, with_gradient_buffer
    from wallx_jax.training.step import compile_train_step

    optimizer, step = train_step_of(model)
    params = params if scan_layers else unstack_layers(params)
    state = jax.jit(lambda p: create_state(p, optimizer))(params)
    if jax.default_backend() == "cpu":  # as in a training run
        state = with_gradient_buffer(state, optimizer)
    micro = jax.tree.map(lambda x: x[None], batch)
    start = time.perf_counter()
    compiled = compile_train_step(step, state, micro)

    def one_step():
        nonlocal state
        state, metrics = compiled(state, micro)
        return metrics["loss"]

    one_step.compile_s = time.perf_counter() - start
    return one_step


def time_train(model, params, batch, scan_layers: bool, repeats: int) -> dict:
    """Measure latency and throughput of a train step."""
    train_one, batch_size = train_program(model, params, batch, scan_layers), len(batch.tokens)
    step_ms = median_ms(train_one, repeats)
    return {
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * batch_size * TOKENS / step_ms,
        "samples_per_s": 1e3 * batch_size / step_ms,
        "compile_s": train_one.compile_s,
    }


def run(model, batch_size: int, what: Sequence[str], scan_layers: bool, repeats: int) -> dict:
    """Run the selected benchmarks on this machine's first device."""
    import jax

    from wallx_jax.models.params import init_params
    from wallx_jax.models.scan import unstack_layers

    batch = jax.device_put(random_batch(model, batch_size))
    params = jax.jit(lambda: init_params(model, 0))()
    figures: dict[str, dict] = {}
    if "train" in what:
        figures["train"] = time_train(model, params, batch, scan_layers, repeats)
    if timers := [time for name, time in (("chunk", time_chunk), ("parts", time_parts)) if name in what]:
        unrolled = unstack_layers(params)
        del params
        figures["inference"] = {}
        for timer in timers:
            figures["inference"] |= timer(model, unrolled, batch, repeats)
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return figures | {
        "peak_memory_gib": peak / 2**30,
        "peak_memory_of": "device" if "peak_bytes_in_use" in stats else "process",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "mid", "wall_oss_3b"), required=True)
    parser.add_argument("--batch", type=int, default=1, help="samples per device")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="what to time; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the median is printed")
    parser.add_argument("--aot", action="store_true", help="compile the train step only, and print bytes per device")
    parser.add_argument("--devices", type=int, default=1, help="with --aot: devices that parameters are cut over")
    parser.add_argument("--target", choices=aot.TARGETS, default="cpu", help="with --aot: the hardware to compile for")
    parser.add_argument("--optimizer", choices=("adamw", "adafactor"), default="adamw", help="with --aot")
    parser.add_argument(
        "--remat",
        choices=("full", "dots", "none"),
        help="what the backward pass recomputes; default: the preset's; with --compare-torch none, fastest on a CPU",
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "xla", "cudnn", "cpu"),
        help="implementation of layers, norms and attention; default: auto; with --aot for a GPU xla",
    )
    parser.add_argument(
        "--scan-layers",
        action=argparse.BooleanOptionalAction,
        help="train with layers scanned or unrolled; default: scanned; with --compare-torch unrolled, faster on a CPU",
    )
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank instead of all weights")
    parser.add_argument("--freeze-vlm", action="store_true", help="with --aot: train the action side only")
    parser.add_argument("--compare-torch", action="store_true", help="compare a chunk with lerobot's PyTorch wall_x")
    parser.add_argument(
        "--torch-python", type=Path, default=Path(".venv-torch/bin/python"), help="with --compare-torch: its python"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.aot:  # before JAX is initialized
        aot.prepare(arguments.target, arguments.devices)

    import jax

    from wallx_jax.models.config import PRESETS

    model = PRESETS[arguments.preset].replace(lora={"rank": arguments.lora_rank})
    # "auto" is the kernels for this machine, not for the target.
    kernels = arguments.kernels or ("xla" if arguments.aot and arguments.target != "cpu" else "auto")
    model = model.replace(numerics={"kernels": kernels})
    if remat := arguments.remat or ("none" if arguments.compare_torch else None):
        model = model.replace(numerics={"remat": remat})
    scan_layers = not arguments.compare_torch if arguments.scan_layers is None else arguments.scan_layers
    if arguments.aot:
        optimizer, step = train_step_of(model, arguments.optimizer, arguments.freeze_vlm)
        sample = jax.tree.map(lambda x: x[0], random_batch(model, 1))
        figures = {"optimizer": arguments.optimizer, "lora_rank": arguments.lora_rank}
        figures |= {"freeze_vlm": arguments.freeze_vlm}
        figures |= aot.plan(
            model, optimizer, step, sample, arguments.batch, scan_layers, arguments.target, arguments.devices
        )
    elif arguments.compare_torch:
        from wallx_jax.models.params import init_params

        params, batch = jax.device_get(init_params(model, 0)), random_batch(model, arguments.batch)
        figures = {
            "compare_torch": compare(model, params, batch, scan_layers, arguments.torch_python, arguments.repeats)
        }
    else:
        figures = run(model, arguments.batch, arguments.what, scan_layers, arguments.repeats)
    report = {
        "preset": arguments.preset,
        "batch_per_device": arguments.batch,
        "tokens": TOKENS,
        "dtype": model.numerics.compute_dtype,
        "kernels": model.numerics.kernels,
        "remat": model.numerics.remat,
        "scan_layers": scan_layers,
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        **figures,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        from wallx_jax.utils.files import write_text

        write_text(arguments.json, text + "\n")


if __name__ == "__main__":
    main()
