"""Map PyTorch tensor names to parameter paths and back, with one table for both directions.

`{l}` in a name is the layer; the tensors of all layers are stacked along the parameter's leading axis, in numeric
order. Names are upstream Wall-X's. Qwen2.5-VL's differ only in the decoder MLP (`mlp` instead of two experts), and it
has no action heads; newer versions of transformers add prefixes to both, which `canonical` removes.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from wallx_jax.models.config import WallXConfig
from wallx_jax.models.params import abstract_params
from wallx_jax.utils import tree
from wallx_jax.weights.ops import Conv3d, Identity, Linear, Op, Shape

LAYER = "{l}"


@dataclass(frozen=True)
class Row:
    """Table entry for one parameter.

    Attributes:
        torch: name of its tensor in PyTorch, or a template with `{l}` for the tensors of all layers.
        path: parameter path.
        op: change of layout between the two.
    """

    torch: str
    path: str
    op: Op

    @property
    def stacked(self) -> bool:
        return LAYER in self.torch

    @functools.cached_property
    def pattern(self) -> re.Pattern:
        """Regular expression that matches the template; the layer is a number without leading zeros."""
        return re.compile(re.escape(self.torch).replace(re.escape(LAYER), "(?P<l>0|[1-9][0-9]*)"))

    def name(self, layer: int | None, qwen: bool) -> str:
        """Return the tensor's full name for a layer, as named in Qwen2.5-VL if `qwen`."""
        template = self.torch.replace("moe.experts.0", "mlp") if qwen else self.torch
        return template.format(l=layer)


def _linear(torch: str, path: str, bias: bool = True) -> list[Row]:
    rows = [Row(f"{torch}.weight", f"{path}/kernel", Linear())]
    return rows + [Row(f"{torch}.bias", f"{path}/bias", Identity())] if bias else rows


def _norm(torch: str, path: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"{path}/scale", Identity())]


def _mlp(torch: str, path: str, bias: bool) -> list[Row]:
    return [row for p in ("gate", "up", "down") for row in _linear(f"{torch}.{p}_proj", f"{path}/{p}", bias)]


_TEXT, _LAYERS = "model.layers.{l}", "decoder/layers"
_BLOCK, _BLOCKS = "visual.blocks.{l}", "vision/blocks"

ROWS: tuple[Row, ...] = (
    Row("model.embed_tokens.weight", "embed/embedding", Identity()),
    *_linear("lm_head", "lm_head", bias=False),
    # decoder
    *_norm(f"{_TEXT}.input_layernorm", f"{_LAYERS}/input_norm"),
    *_norm(f"{_TEXT}.post_attention_layernorm", f"{_LAYERS}/post_norm"),
    *_linear(f"{_TEXT}.self_attn.q_proj", f"{_LAYERS}/attn/q"),
    *_linear(f"{_TEXT}.self_attn.k_proj", f"{_LAYERS}/attn/k"),
    *_linear(f"{_TEXT}.self_attn.v_proj", f"{_LAYERS}/attn/v"),
    *_linear(f"{_TEXT}.self_attn.o_proj", f"{_LAYERS}/attn/o", bias=False),
    *_mlp(f"{_TEXT}.moe.experts.0", f"{_LAYERS}/mlp/vlm", bias=False),
    *_mlp(f"{_TEXT}.moe.experts.1", f"{_LAYERS}/mlp/action", bias=False),
    *_norm("model.norm", "decoder/norm"),
    # vision tower
    Row("visual.patch_embed.proj.weight", "vision/patch_embed/kernel", Conv3d()),
    *_norm(f"{_BLOCK}.norm1", f"{_BLOCKS}/norm1"),
    *_norm(f"{_BLOCK}.norm2", f"{_BLOCKS}/norm2"),
    *_linear(f"{_BLOCK}.attn.qkv", f"{_BLOCKS}/attn/qkv"),
    *_linear(f"{_BLOCK}.attn.proj", f"{_BLOCKS}/attn/proj"),
    *_mlp(f"{_BLOCK}.mlp", f"{_BLOCKS}/mlp", bias=True),
    *_norm("visual.merger.ln_q", "vision/merger/norm"),
    *_linear("visual.merger.mlp.0", "vision/merger/fc1"),  # 1 is the GELU between them
    *_linear("visual.merger.mlp.2", "vision/merger/fc2"),
    # proprioception and action heads
    *_linear("action_preprocessor.propri_proj", "action/propri_proj", bias=False),
    *_linear("action_preprocessor.w1", "action/w1", bias=False),
    *_linear("action_preprocessor.w2", "action/w2", bias=False),
    *_linear("action_preprocessor.w3", "action/w3", bias=False),
    *_linear("action_preprocessor.action_proj_back", "action/proj_back", bias=False),
)
BY_PATH: dict[str, Row] = {row.path: row for row in ROWS}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # the same tensor if they are tied

NORMALIZER = re.compile(r"action_preprocessor\.normalizer_(?P<kind>action|propri)\.(?P<stat>min|delta)\.(?P<robot>.+)")

# Names in layouts that this version does not read, and a description of the layout; the first match applies.
LATER_LAYOUTS: tuple[tuple[re.Pattern, str], ...] = (
    (re.compile(r"lora_|\bbase_layer\b"), "LoRA adapters; merge them into the base model first (merge_and_unload)"),
    (re.compile(r"\b(qkv_proj|gate_up_proj)"), "fused projections (wall-oss 0.5)"),
    (re.compile(r"_proj_experts\.|layernorms\.\d|model\.norms\.\d"), "attention or norm experts (MoT, flow-0.1)"),
    (re.compile(r"\btime_mlp_|norms?\.dense\.|layernorms?\.dense\."), "time-conditioned norms (use_adarms)"),
)  # fmt: skip


def canonical(name: str) -> str:
    """Remove newer transformers' prefixes: model.language_model.* and model.visual.* become model.* and visual.*."""
    return re.sub(r"^model\.(?:(visual\.)|language_model\.)", lambda m: m[1] or "model.", name)


def later_layout(name: str) -> str | None:
    """Describe the unsupported layout that a tensor name belongs to; None if it is not known."""
    return next((label for pattern, label in LATER_LAYOUTS if pattern.search(name)), None)


def parse(name: str) -> tuple[Row, int | None] | None:
    """Return the table row and layer (None if not stacked) of a tensor name in any of the supported namings.

    Returns None for a name that is not in the table.
    """
    name = canonical(name)
    name = re.sub(r"^(model\.layers\.\d+\.)mlp\.", r"\1moe.experts.0.", name)
    for row in ROWS:
        if found := row.pattern.fullmatch(name):
            return row, int(found["l"]) if row.stacked else None
    return None


def group(entries: Iterable[str]) -> list[str]:
    """Combine entries that differ only in the layer number: "model.layers.{0-35}.input_layernorm.weight"."""
    layers: dict[str, list[int]] = {}
    for entry in entries:
        number = re.search(r"(?<=\.)\d+(?=\.)", entry)
        template = entry if number is None else f"{entry[: number.start()]}{LAYER}{entry[number.end() :]}"
        layers.setdefault(template, []).extend([] if number is None else [int(number[0])])
    return [template.replace(LAYER, _ranges(sorted(numbers))) for template, numbers in layers.items()]


def _ranges(numbers: list[int]) -> str:
    """Format sorted numbers as ranges: [0, 1, 2, 5] -> "{0-2,5}", [3] -> "3"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


class TensorSpec(NamedTuple):
    """Source of a parameter, or of one layer of it.

    Attributes:
        row: table row of the parameter.
        layer: index of the layer; None if the parameter is not stacked.
        shape: shape of the tensor in the file.
    """

    row: Row
    layer: int | None
    shape: Shape


def expand(config: WallXConfig) -> dict[str, TensorSpec]:
    """Return {canonical name: TensorSpec} for all tensors of a model, in the order of the table.

    Raises:
        KeyError: if a parameter of the model is not in the table.
    """
    params = tree.flatten(abstract_params(config))
    if unknown := params.keys() - BY_PATH.keys():
        raise KeyError(f"parameters without a row in weights.names.ROWS: {sorted(unknown)}")
    slots = {}
    for row in ROWS:
        if row.path in params:
            shape = params[row.path].shape
            layers, shape = (range(shape[0]), shape[1:]) if row.stacked else ([None], shape)
            for layer in layers:
                slots[row.name(layer, not config.has_action_head)] = TensorSpec(
                    row, layer, row.op.torch_shape(shape, config.vision)
                )
    return slots


def torch_tensors(config: WallXConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Convert parameters, or a tree with their structure such as gradients, to PyTorch's names and layout.

    Returns:
        {canonical name: array}; views if the leaves are NumPy arrays.
    """
    flat = tree.flatten(params)
    tensors = {}
    for name, slot in expand(config).items():
        leaf = flat[slot.row.path]
        tensors[name] = slot.row.op.to_torch(leaf if slot.layer is None else leaf[slot.layer], config.vision)
    return tensors
