"""Build the optimizer: AdamW or Adafactor with learning-rate groups and frozen parameters.

The schedule counts optimizer updates. Upstream's scheduler advances once per process and update, so its 100 warm-up
"steps" correspond to 100 / processes updates here; and with learning-rate groups it decays each peak to the fraction
min_lr / 1e-3 instead of min_lr / learning_rate. Neither is reproduced.
"""

import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from wallx_jax.config.schema import OptimConfig
from wallx_jax.models.lora import is_adapter
from wallx_jax.models.scan import stacked_path
from wallx_jax.utils import tree
from wallx_jax.utils.errors import ConfigError, nearest

ACTION_EXPERT = "decoder/layers/mlp/action/"
ACTION_HEADS = "action/"


def group_of(path: str, config: OptimConfig) -> str:
    """Return the learning-rate group of a parameter path: "vlm", "action_expert" or "frozen".

    Upstream's `freeze_vlm` freezes the action heads as well; `train_action_heads=False` does the same here. With LoRA,
    only the adapters are trained, plus action-side parameters that have no adapter.
    """
    path = stacked_path(path)
    module = path.rpartition("/")[0]
    if config.lora.adapts(module) and not is_adapter(path):
        return "frozen"
    if path.startswith(ACTION_EXPERT):
        return "action_expert"
    if is_adapter(path):
        return "frozen" if config.freeze_vlm else "vlm"
    if config.freeze_vlm or config.lora.rank:
        return "vlm" if path.startswith(ACTION_HEADS) and config.train_action_heads else "frozen"
    return "vlm"


def peak_rate(path: str, config: OptimConfig) -> float:
    """Return the peak learning rate of a trainable parameter."""
    for pattern, rate in config.learning_rates:
        if re.search(pattern, stacked_path(path)):
            return rate
    if group_of(path, config) == "action_expert":
        return config.action_expert_learning_rate or config.learning_rate
    return config.learning_rate


def is_trainable(config: OptimConfig) -> Callable[[str], bool]:
    """Return a predicate that tells whether the parameter at a path is trained."""
    return lambda path: group_of(path, config) != "frozen"


def check_patterns(config: OptimConfig, params: tree.Tree) -> None:
    """Check that each pattern in `learning_rates` and `lora.targets` has an effect.

    Args:
        config: optimizer config.
        params: parameter tree including adapters.

    Raises:
        ConfigError: naming every pattern without effect, the reason, and the nearest path.
    """
    paths = [stacked_path(path) for path in tree.flatten(params)]
    trained, errors = is_trainable(config), []
    given: dict[str, str] = {}  # path -> the pattern that sets its rate
    for pattern, _ in config.learning_rates:
        entry = f"learning_rates: {pattern!r}"
        matched = [path for path in paths if re.search(pattern, path)]
        trainable = [path for path in matched if trained(path)]
        if not matched:
            errors.append(f"{entry} matches no parameter{_nearest_path(pattern, paths)}")
        elif not trainable:
            errors.append(f"{entry} matches frozen parameters alone, such as {matched[0]!r}; leave it out")
        elif all(path in given for path in trainable):
            earlier = list(dict.fromkeys(given[path] for path in trainable))
            errors.append(
                f"{entry} matches only what {earlier} took before it, the first match counts; put it before, or leave "
                "it out"
            )
        for path in trainable:
            given.setdefault(path, pattern)
    adapted = [path.removesuffix("/lora_a") for path in paths if path.endswith("/lora_a")]
    layers = [path.removesuffix("/kernel") for path in paths if path.endswith("/kernel")]
    for target in config.lora.targets if adapted else ():
        if not any(re.search(target, layer) for layer in adapted):
            heads = any(re.search(target, layer) for layer in layers)
            why = "; the action heads never get one, they are trained themselves" if heads else ""
            errors.append(
                f"lora.targets: {target!r} matches no linear layer that gets an adapter"
                f"{why or _nearest_path(target, layers)}"
            )
    if errors:
        raise ConfigError(*errors)


def _nearest_path(pattern: str, paths: Sequence[str]) -> str:
    """Return a hint with the path, or path prefix, that is closest to a pattern."""
    parts = [path.split("/") for path in paths]
    known = dict.fromkeys("/".join(part[:length]) for part in parts for length in range(1, len(part) + 1))
    return nearest(re.sub(r"[\\^$.*+?|()\[\]{}]", "", pattern).strip("/"), list(known)) or (
        f"; the first part of a path is one of {sorted({part[0] for part in parts})}"
    )


def schedule(peak: float, config: OptimConfig, decay_steps: int) -> optax.Schedule:
    """Return a schedule with linear warm-up from 0 to `peak`, then cosine decay to peak * min_lr / learning_rate.

    That is min_lr itself if the peak is learning_rate. It is reached after `decay_steps` updates, so the last of these
    updates still uses a slightly higher rate.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=config.warmup_steps,
        decay_steps=max(decay_steps, config.warmup_steps + 1),
        end_value=peak * config.min_lr / config.learning_rate,
    )


def make_optimizer(config: OptimConfig, decay_steps: int) -> optax.GradientTransformation:
    """Create the optimizer for the trainable part of the parameter tree.

    Weight decay applies to every parameter, as upstream. AdamW uses b1 = 0.9, b2 = 0.999, eps = 1e-8. Adafactor (arXiv
    1804.04235) replaces it with factored second moments, no first moments and updates clipped to RMS 1; learning rate
    and weight decay work as for AdamW.

    Gradient clipping is not included: the train step clips once per update, with the norm that it logs.
    """

    if config.optimizer == "adamw":
        moments = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    else:
        moments = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return optax.chain(
        moments, optax.add_decayed_weights(config.weight_decay), _scale_by_learning_rates(config, decay_steps)
    )


def _scale_by_learning_rates(config: OptimConfig, decay_steps: int) -> optax.GradientTransformation:
    """Scale each parameter's update by minus its own learning rate.

    The state is only the update count and does not depend on the rates, so a run can be resumed with different ones.
    """

    def init(_: tree.Tree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: tree.Tree, state: optax.ScaleByScheduleState, params: tree.Tree | None = None
    ) -> tuple[tree.Tree, optax.ScaleByScheduleState]:
        rate = functools.cache(lambda peak: schedule(peak, config, decay_steps)(state.count))

        def scaled(path: str, update: jax.Array) -> jax.Array:
            return (-rate(peak_rate(path, config))).astype(update.dtype) * update

        return tree.map_with_path(scaled, updates), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def global_norm(grads) -> jax.Array:
    """Return the L2 norm of all gradients, accumulated in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))


def clip(grads, norm: jax.Array, max_norm: float):
    """Scale gradients down to `max_norm` if their `norm` exceeds it."""
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
