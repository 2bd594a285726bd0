"""Run recorded PyTorch inputs through this model and compare every recorded output.

    python scripts/parity.py --model DIR --golden FILE.npz [--json OUT]

DIR contains config.json and model.safetensors in upstream's or Hugging Face's layout; FILE contains `in.*` and `out.*`
arrays. A name's suffix selects the numerics: none for bidirectional action attention and Qwen's M-RoPE, `.causal` for
causal action tokens, `.cuda` for causal action tokens and the rotary layout of upstream's kernel.

Prints a line per output. Exit code 1 if an output differs by more than 1e-4 of its largest magnitude (gradients and
updated parameters: 1e-3), if integers differ at all, or if the script does not know how to compute an output.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wallx_jax.config.schema import OptimConfig
from wallx_jax.models import flow, losses
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.generate import generate
from wallx_jax.models.params import from_params
from wallx_jax.models.positions import position_ids, rope_delta
from wallx_jax.models.vision_plan import Grid, token_count
from wallx_jax.models.wallx import FlowTarget, LossTotals, Prefix
from wallx_jax.training.optimizer import clip, make_optimizer
from wallx_jax.utils.files import write_text
from wallx_jax.weights.load import load_params
from wallx_jax.weights.names import torch_tensors

SEMANTICS = {
    "": {"action_attention": "bidirectional", "mrope_layout": "qwen"},
    "causal": {"action_attention": "causal", "mrope_layout": "qwen"},
    "cuda": {"action_attention": "causal", "mrope_layout": "upstream_cuda"},
}
FLOAT32 = {"param_dtype": "float32", "compute_dtype": "float32", "masked_dims": "drift", "flow_loss": "all"}

# The optimizer that recorded adamw_*: see the golden arrays' README.
ADAMW = OptimConfig(
    learning_rate=9e-5,
    min_lr=5e-5,
    warmup_steps=2,
    action_expert_learning_rate=None,
    weight_decay=0.1,
    max_grad_norm=1.0,
    freeze_vlm=False,
    train_action_heads=True,
)
DECAY_STEPS = 10


Arrays = dict[str, jax.Array]
PER_ROW = ("input_ids", "attention_mask", "labels", "proprioception", "agent_pos_mask", "action_chunk", "dof_mask",
           "noise", "time", "euler_noise")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of the recorded batch with equal grids, which can run as one batch.

    Attributes:
        rows: indices of the rows in the recorded batch.
        blocks: ("image" or "video", grid, seconds per frame) of each visual block, in the order of the prompt.
        arrays: the recorded per-row inputs of these rows, and "patches" float32 [B, P, patch_dim] in the order of
            blocks. They are arguments of the compiled functions: as constants they would take minutes to compile.
    """

    rows: tuple[int, ...]
    blocks: tuple[tuple[str, Grid, float], ...]
    arrays: Arrays

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(grid for _, grid, _ in self.blocks)

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(seconds for _, _, seconds in self.blocks)


def group_rows(inputs: dict[str, np.ndarray], config: WallXConfig) -> list[Group]:
    """Group rows by their grids, and split the recorded patches, which are concatenated over all rows, by row."""
    ids = {config.tokens.image: "image", config.tokens.video: "video"}
    patches = {"image": inputs.get("pixel_values"), "video": inputs.get("pixel_values_videos")}
    grids = {"image": inputs.get("image_grid_thw"), "video": inputs.get("video_grid_thw")}
    seconds = {"image": None, "video": inputs.get("second_per_grid_ts")}
    used, start = {"image": 0, "video": 0}, {"image": 0, "video": 0}
    groups: dict[tuple, tuple[list[int], list[np.ndarray]]] = {}
    for row, tokens in enumerate(inputs["input_ids"]):
        blocks, parts, at = [], [], 0
        while at < len(tokens):
            kind = ids.get(int(tokens[at]))
            if kind is None:
                at += 1
                continue
            grid = tuple(int(n) for n in grids[kind][used[kind]])
            per_frame = float(seconds[kind][used[kind]]) if seconds[kind] is not None else float(kind == "video")
            blocks.append((kind, grid, per_frame))
            parts.append(patches[kind][start[kind] : start[kind] + np.prod(grid)])
            used[kind] += 1
            start[kind] += np.prod(grid)
            at += token_count(grid, config.vision)
        rows, stacks = groups.setdefault(tuple(blocks), ([], []))
        rows.append(row)
        stacks.append(np.concatenate(parts) if parts else np.zeros((0, config.vision.patch_dim), np.float32))
    return [
        Group(tuple(rows), blocks, {"patches": jnp.asarray(np.stack(stacks))} | _rows(inputs, rows))
        for blocks, (rows, stacks) in groups.items()
    ]


def _rows(inputs: dict[str, np.ndarray], rows: list[int]) -> Arrays:
    arrays = {name: inputs[name][rows] for name in PER_ROW if name in inputs}
    return {name: jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else None) for name, x in arrays.items()}


class Case:
    """A golden file and the model to run it on; every `out.*` array has a method or a branch that computes it."""

    def __init__(self, config: WallXConfig, params, inputs: dict[str, np.ndarray]):
        self.config, self.params, self.inputs = config, params, inputs
        self.groups = group_rows(inputs, config)
        self.mask = inputs["attention_mask"].astype(bool)
        self.horizon = int(inputs["moe_token_types"][0].sum()) if "moe_token_types" in inputs else 0
        self.prefix_length = self.mask.shape[1] - self.horizon

    def config_for(self, semantics: str) -> WallXConfig:
        return self.config.replace(numerics=SEMANTICS[semantics])

    def scatter(self, per_group: Sequence[jax.Array], axis: int = 0) -> np.ndarray:
        """Concatenate the groups' results along `axis`, in row order."""
        order = np.argsort(np.concatenate([group.rows for group in self.groups]))
        return np.take(np.concatenate(per_group, axis=axis), order, axis=axis)

    # The model's inputs for one group

    def prefix(self, net, group: Group, arrays: Arrays) -> Prefix:
        features = net.encode_patches(arrays["patches"], group.grids) if group.blocks else None
        state = (None, None)
        if "proprioception" in arrays:
            state = (arrays["proprioception"][:, 0], arrays["agent_pos_mask"][:, 0])
        tokens, mask = (arrays[name][:, : self.prefix_length] for name in ("input_ids", "attention_mask"))
        return net.embed_prefix(tokens, mask > 0, features, group.grids, *state, seconds_per_frame=group.seconds)

    def flow_target(self, arrays: Arrays) -> FlowTarget | None:
        if not self.horizon:
            return None
        return FlowTarget(*(arrays[name] for name in ("action_chunk", "dof_mask", "noise", "time")))

    def run(self, function, semantics: str = "") -> list:
        """Jit-compile and run function(net, group, arrays) on every group."""
        config = self.config_for(semantics)
        return [
            jax.jit(lambda params, arrays, group=group: function(from_params(config, params), group, arrays))(
                self.params, group.arrays
            )
            for group in self.groups
        ]

    # Outputs of the golden files

    @functools.cached_property
    def features(self) -> dict[str, np.ndarray]:
        """Compute the vision features of all images, and of all videos, in row order."""
        found: dict[str, list[tuple[int, np.ndarray]]] = {"image": [], "video": []}
        outputs = self.run(
            lambda net, group, arrays: net.encode_patches(arrays["patches"], group.grids) if group.blocks else None
        )
        for group, out in zip(self.groups, outputs, strict=True):
            if out is None:
                continue
            for row, features in zip(group.rows, np.asarray(out), strict=True):
                at = 0
                for kind, grid, _ in group.blocks:
                    count = token_count(grid, self.config.vision)
                    found[kind].append((row, features[at : at + count]))
                    at += count
        return {
            kind: np.concatenate([features for _, features in sorted(parts, key=lambda part: part[0])])
            for kind, parts in found.items()
            if parts
        }

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """Compute position ids, int [3, B, S], including action tokens."""

        def of(net, group: Group, arrays: Arrays) -> jax.Array:
            mask = arrays["attention_mask"] > 0
            return position_ids(
                arrays["input_ids"], mask, group.grids, self.config.vision, self.config.tokens, group.seconds
            )

        return self.scatter(self.run(of), axis=1)

    @functools.cache  # noqa: B019
    def hidden(self, semantics: str) -> dict[str, np.ndarray]:
        """Compute hidden states [B, S, D], those of every layer [L, B, S, D], and logits [B, S, V]."""

        def of(net, group: Group, arrays: Arrays):
            suffix = None
            if (target := self.flow_target(arrays)) is not None:
                suffix = (flow.interpolate(target.actions, target.noise, target.time), target.mask, target.time)
            out = net.forward(self.prefix(net, group, arrays), suffix, output_hidden_states=True)
            return out.hidden, out.hidden_states, net.logits(out.hidden)

        hidden, layers, logits = zip(*self.run(of, semantics), strict=True)
        return {
            "hidden": self.scatter(hidden),
            "hidden_layers": self.scatter(layers, axis=1),
            "logits": self.scatter(logits),
        }

    def loss(self, params, all_arrays: list[Arrays], semantics: str):
        """Return (loss, its parts), averaged over all rows; `all_arrays`: the arrays of each group."""
        net = from_params(self.config_for(semantics), params)
        sums, counts = LossTotals(jnp.float32(0), jnp.float32(0)), LossTotals(jnp.float32(0), jnp.float32(0))
        for group, arrays in zip(self.groups, all_arrays, strict=True):
            labels = arrays.get("labels", jnp.zeros((len(group.rows), 0), jnp.int32))[:, 1 : self.prefix_length]
            target = self.flow_target(arrays)
            part = net.loss_sums(self.prefix(net, group, arrays), labels, target)
            flow_count = flow.flow_count(target.mask, "all") if target is not None else jnp.float32(0)
            sums = jax.tree.map(jnp.add, sums, part)
            counts = jax.tree.map(jnp.add, counts, LossTotals(losses.label_count(labels), flow_count))
        parts = jax.tree.map(lambda s, c: s / jnp.maximum(c, 1), sums, counts)
        return parts.cross_entropy + parts.flow, parts

    @functools.cache  # noqa: B019
    def grad_fn(self, semantics: str):
        compiled = jax.jit(jax.value_and_grad(functools.partial(self.loss, semantics=semantics), has_aux=True))
        return lambda params: compiled(params, [group.arrays for group in self.groups])

    @functools.cache  # noqa: B019
    def loss_and_grads(self, semantics: str):
        (loss, parts), grads = self.grad_fn(semantics)(self.params)
        return loss, parts, torch_tensors(self.config, grads)

    def euler(self, semantics: str, steps: int) -> np.ndarray:
        def of(net, group: Group, arrays: Arrays) -> jax.Array:
            prefix = self.prefix(net, group, arrays)
            return net.sample_actions(prefix, arrays["euler_noise"], arrays["dof_mask"], steps)

        return self.scatter(self.run(of, semantics))

    def generated(self, count: int, semantics: str) -> np.ndarray:
        """Generate a greedy continuation, int [B, count], ignoring end tokens."""
        tokens = self.run(lambda net, group, arrays: generate(net, self.prefix(net, group, arrays), count), semantics)
        return self.scatter(tokens)

    @functools.cache  # noqa: B019
    def adamw(self, semantics: str, updates: int) -> dict[str, object]:
        optimizer = make_optimizer(ADAMW, DECAY_STEPS)
        params, state = self.params, optimizer.tx.init(self.params)
        seen = []

        @jax.jit
        def update(params, state, grads):
            norm = optax.tree.norm(grads)
            changes, state = optimizer.tx.update(clip(grads, norm, ADAMW.max_grad_norm), state, params)
            return jax.tree.map(jnp.add, params, changes), state, norm

        for step in range(updates):
            (loss, _), grads = self.grad_fn(semantics)(params)
            params, state, norm = update(params, state, grads)
            seen.append((loss, norm, optimizer.schedules["vlm"](step)))
        lost, norms, rates = (np.array(column, np.float64) for column in zip(*seen, strict=True))
        return {"losses": lost, "grad_norms": norms, "lrs": rates, "param": torch_tensors(self.config, params)}

    def compute(self, name: str, expected: np.ndarray, updates: int) -> np.ndarray | None:
        """Compute the array out.NAME; None if it is unknown.

        Args:
            name: name without "out.".
            expected: the recorded array.
            updates: number of AdamW steps to run for adamw_* outputs.
        """
        head, _, tensor = name.partition("/")
        base, _, semantics = head.partition(".")
        if semantics not in SEMANTICS:
            return None
        if base in ("vision", "image_features", "video_features"):
            return self.features.get("video" if base == "video_features" else "image")
        if base == "position_ids":
            return self.positions
        if base == "rope_deltas":
            return np.asarray(rope_delta(jnp.asarray(self.positions), jnp.asarray(self.mask)))[:, None]
        if base in ("hidden", "hidden_layers", "logits"):
            return self.hidden(semantics)[base]
        if base in ("loss", "cross_entropy_loss", "flow_loss"):
            loss, parts, _ = self.loss_and_grads(semantics)
            return np.asarray({"loss": loss, "cross_entropy_loss": parts.cross_entropy, "flow_loss": parts.flow}[base])
        if base == "grad":
            return self.loss_and_grads(semantics)[2].get(tensor)
        if base == "gen_tokens":
            return self.generated(expected.shape[1], semantics)
        if base.startswith("euler") and base[5:].isdigit():
            return self.euler(semantics, int(base[5:]))
        if base.startswith("adamw_"):
            done, kind = self.adamw(semantics, updates), base.removeprefix("adamw_")
            return done["param"].get(tensor) if kind == "param" else done.get(kind)
        return None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of one output.

    Attributes:
        name: name of the output.
        ok: whether it is within tolerance.
        max_abs: largest absolute error over unpadded positions.
        max_rel: the same relative to the largest recorded magnitude.
        note: reason if there are no errors to report.
    """

    name: str
    ok: bool
    max_abs: float | None = None
    max_rel: float | None = None
    note: str = ""

    def line(self) -> str:
        errors = f"abs {self.max_abs:.2e}  rel {self.max_rel:.2e}" if self.max_abs is not None else self.note
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:<72} {errors}"


def compare(name: str, expected: np.ndarray, actual: np.ndarray | None, mask: np.ndarray) -> Comparison:
    if actual is None:
        return Comparison(name, False, note="not computed by this script")
    actual = np.asarray(actual)
    if actual.shape != expected.shape:
        return Comparison(name, False, note=f"shape {actual.shape}, recorded {expected.shape}")
    base = name.split("/")[0].split(".")[0]
    if base in ("position_ids", "hidden_layers"):
        expected, actual = expected[:, mask], actual[:, mask]
    elif base in ("hidden", "logits"):
        expected, actual = expected[mask], actual[mask]
    error = np.abs(actual.astype(np.float64) - expected).max(initial=0.0)
    scale = np.abs(expected).max(initial=0.0)
    relative = error / scale if scale else error
    tolerance = 0.0 if expected.dtype.kind in "iu" else 1e-3 if base in ("grad", "adamw_param") else 1e-4
    return Comparison(name, bool(relative <= tolerance), float(error), float(relative))


def run(model_dir: Path, golden: Path, kernels: str = "auto") -> list[Comparison]:
    """Compare every out.* array of a golden file with what this model computes from its in.* arrays."""
    with np.load(golden) as file:
        meta = json.loads(str(file["meta"])) if "meta" in file else {}
        inputs = {key.removeprefix("in."): file[key] for key in file.files if key.startswith("in.")}
        expected = {key.removeprefix("out."): file[key] for key in file.files if key.startswith("out.")}
    if not expected:
        raise SystemExit(f"{golden} contains no out.* arrays")
    config, params = load_params(model_dir, numerics=FLOAT32 | {"kernels": kernels})
    ids = {"propri": meta.get("propri_token_id"), "action": meta.get("action_token_id")}
    config = config.replace(tokens={name: number for name, number in ids.items() if number is not None})
    case = Case(config, jax.tree.map(jnp.asarray, params), inputs)
    updates = len(expected.get("adamw_losses", ()))
    return [
        compare(name, array, case.compute(name, array, updates), case.mask) for name, array in sorted(expected.items())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json and model.safetensors")
    parser.add_argument("--golden", type=Path, required=True, help="file of recorded in.* and out.* arrays")
    parser.add_argument("--json", type=Path, help="also write the report here")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    results = run(arguments.model, arguments.golden)
    for result in results:
        print(result.line())
    failed = sum(not result.ok for result in results)
    print(f"{len(results) - failed} of {len(results)} arrays agree")
    if arguments.json:
        write_text(arguments.json, json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
