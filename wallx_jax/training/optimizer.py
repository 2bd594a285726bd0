"""Build the optimizer: AdamW or Adafactor with learning-rate groups and frozen parameters.

The schedule counts optimizer updates. Upstream's scheduler advances once per process and update, so its 100 warm-up
"steps" correspond to 100 / processes updates here; and with learning-rate groups it decays each peak to the fraction
min_lr / 1e-3 instead of min_lr / learning_rate. Neither is reproduced.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


VLM, EXPERT, FROZEN = "vlm", "action_expert", "frozen"


@dataclass(frozen=True)
class Optimizer:
    """The optimizer of a run, built once by `make_optimizer`.

    Every trainable parameter belongs to one learning-rate group. Groups are named after what selects their parameters,
    never after a rate, and do not appear in the optimizer state: a run can be resumed with other rates and groups.

    Attributes:
        config: settings.
        tx: gradient transformation of the trainable parameters. Gradient clipping is not included: the train step
            clips once per update, with the norm that it logs.
        peaks: peak learning rate of each group: "vlm" (`learning_rate`), "action_expert", and "rule:PATTERN" for each
            entry of `learning_rates`. Not every group has parameters.
        schedules: learning rate of each group by the number of preceding updates.
    """

    config: OptimConfig
    tx: optax.GradientTransformation
    peaks: Mapping[str, float]
    schedules: Mapping[str, optax.Schedule]

    def group_of(self, path: str) -> str:
        """Return the learning-rate group of a parameter path: a key of `schedules`, or "frozen"."""
        return _group_of(path, self.config)

    def is_trainable(self, path: str) -> bool:
        """Return whether the parameter at a path is trained."""
        return self.group_of(path) != FROZEN

    def groups(self, params: tree.Tree) -> list[str]:
        """Return the groups that have parameters in `params`, in the order of `schedules`."""
        found = {self.group_of(path) for path in tree.flatten(params)}
        return [group for group in self.schedules if group in found]


def make_optimizer(config: OptimConfig, decay_steps: int) -> Optimizer:
    """Create the optimizer for the trainable part of the parameter tree.

    Weight decay applies to every parameter, as upstream. AdamW uses b1 = 0.9, b2 = 0.999, eps = 1e-8. Adafactor (arXiv
    1804.04235) replaces it with factored second moments, no first moments and updates clipped to RMS 1; learning rate
    and weight decay work as for AdamW.

    Args:
        config: settings.
        decay_steps: updates until the learning rate has decayed.
    """
    peaks = {VLM: config.learning_rate, EXPERT: config.action_expert_learning_rate or config.learning_rate}
    peaks |= {_rule(pattern): rate for pattern, rate in config.learning_rates}
    schedules = {group: make_schedule(peak, config, decay_steps) for group, peak in peaks.items()}
    if config.optimizer == "adamw":
        moments = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    else:
        moments = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    scale = _scale_by_group(schedules, lambda path: _group_of(path, config))
    tx = optax.chain(moments, optax.add_decayed_weights(config.weight_decay), scale)
    return Optimizer(config, tx, peaks, schedules)


def make_schedule(peak: float, config: OptimConfig, decay_steps: int) -> optax.Schedule:
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


def _scale_by_group(
    schedules: Mapping[str, optax.Schedule], group_of: Callable[[str], str]
) -> optax.GradientTransformation:
    """Scale each parameter's update by minus the learning rate of its group.

    Like optax.scale_by_learning_rate, but for several groups. The state is only the update count, whatever the groups,
    whereas optax.partition would make their names part of every checkpoint.
    """

    def init(_: tree.Tree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: tree.Tree, state: optax.ScaleByScheduleState, params: tree.Tree | None = None
    ) -> tuple[tree.Tree, optax.ScaleByScheduleState]:
        rates = {group: schedule(state.count) for group, schedule in schedules.items()}

        def scaled(path: str, update: jax.Array) -> jax.Array:
            return (-rates[group_of(path)]).astype(update.dtype) * update

        return tree.map_with_path(scaled, updates), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _group_of(path: str, config: OptimConfig) -> str:
    """Return the learning-rate group of a parameter path; the first matching rule takes precedence."""
    path = stacked_path(path)
    component = _trained_component(path, config)
    if component != FROZEN:
        for pattern, _ in config.learning_rates:
            if re.search(pattern, path):
                return _rule(pattern)
    return component


def _rule(pattern: str) -> str:
    return f"rule:{pattern}"


def _trained_component(path: str, config: OptimConfig) -> str:
    """Return "action_expert", "vlm" (which includes the action heads), or "frozen".

    Upstream's `freeze_vlm` freezes the action heads as well; `train_action_heads=False` does the same here. With LoRA,
    only the adapters are trained, plus action-side parameters that have no adapter.
    """
    module = path.rpartition("/")[0]
    if config.lora.adapts(module) and not is_adapter(path):
        return FROZEN
    if path.startswith(ACTION_EXPERT):
        return EXPERT
    if is_adapter(path):
        return FROZEN if config.freeze_vlm else VLM
    if config.freeze_vlm or config.lora.rank:
        return VLM if path.startswith(ACTION_HEADS) and config.train_action_heads else FROZEN
    return VLM


def clip(grads: tree.Tree, norm: jax.Array, max_norm: float) -> tree.Tree:
    """Scale gradients down to `max_norm` if their `norm` exceeds it."""
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


def check_patterns(optimizer: Optimizer, params: tree.Tree) -> None:
    """Check that each pattern in `learning_rates` and `lora.targets` has an effect.

    Args:
        optimizer: the run's optimizer.
        params: parameter tree including adapters.

    Raises:
        ConfigError: naming every pattern without effect, the reason, and the nearest path.
    """
    config, errors = optimizer.config, []
    paths = [stacked_path(path) for path in tree.flatten(params)]
    given: dict[str, str] = {}  # path -> the pattern that sets its rate
    for pattern, _ in config.learning_rates:
        entry = f"learning_rates: {pattern!r}"
        matched = [path for path in paths if re.search(pattern, path)]
        trainable = [path for path in matched if optimizer.is_trainable(path)]
        if not matched:
            errors.append(f"{entry} matches no parameter{_nearest_path(pattern, paths)}")
        elif not trainable:
            errors.append(f"{entry} matches only frozen parameters, such as {matched[0]!r}; leave it out")
        elif all(path in given for path in trainable):
            earlier = list(dict.fromkeys(given[path] for path in trainable))
            errors.append(
                f"{entry} matches only parameters that {earlier} match before it, and the first match counts; put it "
                "before them, or leave it out"
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
