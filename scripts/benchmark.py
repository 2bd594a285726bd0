"""Times one train step and one action chunk, or works out the memory of a full-size train step without running it.

    python scripts/benchmark.py --preset mid [--batch 1] [--json OUT]
    python scripts/benchmark.py --preset wall_oss_3b --aot --devices 8 [--json OUT]

Each sample has three 252x196 images and 285 tokens, 32 of them action tokens. Weights are random: speed does not depend
on them. Prints JSON. `--aot` compiles for N virtual CPU devices, sharded over fsdp; the CPU compiler keeps some
bfloat16 arrays in float32, so its figures are upper bounds for an accelerator.
"""

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

ACTIONS, TOKENS, IMAGE, CAMERAS, STEPS = 32, 285, (196, 252), 3, 10


def random_batch(model, batch: int):
    """A batch of random pixels and tokens in the layout of three cameras and one state token."""
    import numpy as np

    from wallx_jax.data.batch import Batch

    rng, ids, action = np.random.default_rng(0), model.tokens, model.action
    length, image_tokens = TOKENS - ACTIONS, IMAGE[0] * IMAGE[1] // 28**2
    tokens = rng.integers(0, min(ids.image, 1000), (batch, length))
    for camera in range(CAMERAS):
        start = 16 + camera * (image_tokens + 4)
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
    """Median wall time of a call, after one that is not counted."""
    import jax
    import numpy as np

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


def train_step_of(model):
    from wallx_jax.config import default_config
    from wallx_jax.run_config import OptimConfig
    from wallx_jax.training.step import Objective, make_train_step

    c = default_config()
    optim = OptimConfig(
        learning_rate=c.learning_rate,
        min_lr=c.min_lr,
        warmup_steps=c.num_warmup_steps,
        action_expert_learning_rate=None,
        weight_decay=c.weight_decay,
        max_grad_norm=c.max_grad_norm,
        freeze_vlm=False,
        train_action_expert_only=False,
        train_action_heads=True,
    )
    return optim, make_train_step(model, optim, 1000, Objective(), seed=0)


def run(model, batch_size: int, repeats: int) -> dict:
    """Figures measured on this machine's first device."""
    import jax
    import jax.numpy as jnp

    from wallx_jax.models.wallx import bind, init_params
    from wallx_jax.training.state import create_state

    batch = jax.device_put(random_batch(model, batch_size))
    params = jax.jit(lambda: init_params(model, 0))()
    noise = jnp.zeros(batch.actions.shape)

    vision = jax.jit(lambda p, b: bind(model, p).encode_images(b.images)[0])
    whole_prefix = jax.jit(lambda p, b: bind(model, p).encode_prefix(bind(model, p).embed_batch(b))[0])
    denoise = jax.jit(lambda p, c, x, m: bind(model, p).suffix_velocity(c, x, m, jnp.zeros(len(x))))
    chunk = jax.jit(
        lambda p, b, n: bind(model, p).sample_actions(bind(model, p).embed_batch(b), n, b.action_mask, STEPS)
    )
    cache = whole_prefix(params, batch)
    vision_ms = median_ms(lambda: vision(params, batch), repeats)
    inference = {
        "vision_ms": vision_ms,
        "prefix_ms": median_ms(lambda: whole_prefix(params, batch), repeats) - vision_ms,
        "denoise_step_ms": median_ms(lambda: denoise(params, cache, noise, batch.action_mask), repeats),
        "chunk_ms": median_ms(lambda: chunk(params, batch, noise), repeats),
        "euler_steps": STEPS,
    }

    optim, step = train_step_of(model)
    state = jax.jit(lambda p: create_state(p, optim, 1000))(params)
    micro = jax.tree.map(lambda x: x[None], batch)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, micro).compile()
    compile_s = time.perf_counter() - start

    def one_step():
        nonlocal state
        state, metrics = compiled(state, micro)
        return metrics["loss"]

    step_ms = median_ms(one_step, repeats)
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {
        "train": {
            "step_ms": step_ms,
            "tokens_per_s": 1e3 * batch_size * TOKENS / step_ms,
            "samples_per_s": 1e3 * batch_size / step_ms,
            "compile_s": compile_s,
        },
        "inference": inference,
        "peak_memory_gib": peak / 2**30,
        "peak_memory_of": "device" if "peak_bytes_in_use" in stats else "process",
    }


def plan(model, batch_size: int, devices: int) -> dict:
    """The compiler's account of the train step on `devices` devices, nothing allocated."""
    import jax

    from wallx_jax.run_config import MeshConfig
    from wallx_jax.training import sharding
    from wallx_jax.training.loop import abstract_batch
    from wallx_jax.training.start import abstract_state

    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=devices, tensor=1))
    optim, step = train_step_of(model)
    state = abstract_state(model, optim, 1000, mesh)
    sample = jax.tree.map(lambda x: x[0], random_batch(model, 1))
    batch = abstract_batch(sample, batch_size * devices, mesh, 1)
    out = (jax.tree.map(lambda x: x.sharding, state), None)
    start = time.perf_counter()
    memory = jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch).compile().memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "devices": devices,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "per_device_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs) / 2**30,
        "compile_s": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "mid", "wall_oss_3b"), required=True)
    parser.add_argument("--batch", type=int, default=1, help="samples per device")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the median is printed")
    parser.add_argument("--aot", action="store_true", help="compile the train step only, and print bytes per device")
    parser.add_argument("--devices", type=int, default=1, help="with --aot: devices that parameters are cut over")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.aot:  # before jax starts
        os.environ["JAX_PLATFORMS"] = "cpu"
        flag = f"--xla_force_host_platform_device_count={arguments.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

    import jax

    from wallx_jax.models.config import PRESETS

    model = PRESETS[arguments.preset]
    figures = (
        plan(model, arguments.batch, arguments.devices)
        if arguments.aot
        else run(model, arguments.batch, arguments.repeats)
    )
    report = {
        "preset": arguments.preset,
        "batch_per_device": arguments.batch,
        "tokens": TOKENS,
        "dtype": model.numerics.compute_dtype,
        "remat": model.numerics.remat,
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        **figures,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
