"""Model FLOPs of an update, counted from shapes, and the share of the accelerator's peak that a run reaches (MFU).

What is counted: the multiplications and additions of matrix products, 2 per weight and token (PaLM, arXiv 2204.02311,
appendix B). A trained layer costs three times its forward pass: once forward, once for the gradient of its input, once
for that of its weights. A frozen one has no gradient of weights, and the vision tower no backward pass at all where
nothing in it is trained. Recomputation (`numerics.remat`) earns no credit, and neither do norms, softmax, rotary angles
or the optimizer. Attention counts every score, masked or not, and padding counts as tokens. Every layer counts for all
tokens, though the last one, where layers are apart, is worked out only for those that have a loss.

Legend: P patches, T prefix tokens, A action tokens, W label window, D width.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jax.sharding import Mesh

from wallx_jax.data.batch import Batch
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.params import abstract_params
from wallx_jax.models.vision_plan import plan_frame
from wallx_jax.utils import tree

# Dense bfloat16 products with float32 sums, TFLOP/s of one device, by jax's `device_kind`; the first match counts.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"A100", 312),  # NVIDIA A100 Tensor Core GPU datasheet
    (r"H100 NVL", 835),  # NVIDIA H100 Tensor Core GPU datasheet: half of the figures with sparsity
    (r"H100 PCIe", 756),
    (r"H100", 989),
    (r"H200 NVL", 835),  # NVIDIA H200 Tensor Core GPU datasheet
    (r"H200", 989),
    (r"L40S", 362),  # NVIDIA L40S datasheet
    (r"RTX 4090(?! D| Laptop)", 165),  # NVIDIA Ada GPU architecture whitepaper
    (r"RTX 5090(?! D| Laptop)", 209),  # NVIDIA RTX Blackwell GPU architecture whitepaper
    (r"^TPU v4$", 275),  # Google Cloud TPU system architecture pages, per chip
    (r"^TPU (v5 lite|v5e)$", 197),
    (r"^TPU (v5p|v5)$", 459),
    (r"^TPU (v6 lite|v6e)$", 918),
)
READ_DATA = ("vision/patch_embed/", "action/propri_proj/", "action/w1/")  # their input needs no gradient


class Product(NamedTuple):
    """Matrix products of one sample's forward pass: FLOPs, and the parameter (None: attention, which has none)."""

    part: str
    parameter: str | None
    flops: int


def products(model: WallXConfig, sample: Batch, use_flow: bool = True) -> Iterator[Product]:
    """The forward pass of one sample (arrays or shapes without a batch axis); without `use_flow` no action tokens."""
    vision, text = model.vision, model.text
    grids = [(x.shape[0] // vision.patch_size, x.shape[1] // vision.patch_size) for x in sample.images]
    patches = sum(rows * columns for rows, columns in grids)
    prefix, window = sample.tokens.shape[0], sample.labels.shape[0]
    horizon = sample.actions.shape[0] if use_flow else 0

    def tokens(path: str) -> float:
        """How many rows are multiplied by this matrix."""
        if path.startswith("vision/"):
            return patches / vision.spatial_merge_size**2 if path.startswith("vision/merger/") else patches
        if path.startswith("decoder/"):
            expert = {"vlm": prefix, "action": horizon}
            return expert[path.split("/")[3]] if "/mlp/" in path else prefix + horizon
        if path.startswith("action/propri_proj/"):
            return 1
        if path.startswith("action/w2/"):
            return horizon + 1 if horizon else 0  # the action tokens and the flow time, zeros in the other's half
        return horizon if path.startswith("action/") else window

    head = "embed/embedding" if text.tie_word_embeddings else "lm_head/kernel"
    for path, spec in tree.flatten(abstract_params(model)).items():
        if path == head or path.endswith(("/kernel", "/lora_a", "/lora_b")):
            yield Product(path.split("/")[0], path, round(2 * math.prod(spec.shape) * tokens(path)))

    windowed = full = 0  # pairs of patches
    for rows, columns in grids:
        windowed += sum(count * size**2 for count, size in plan_frame(rows, columns, vision).windows)
        full += (rows * columns) ** 2
    full_layers = sum(index < vision.depth for index in vision.fullatt_block_indexes)
    pairs = full_layers * full + (vision.depth - full_layers) * windowed
    yield Product("vision", None, 4 * vision.hidden_size * pairs)
    yield Product("decoder", None, 4 * text.hidden_size * text.num_hidden_layers * (prefix + horizon) ** 2)


def forward_flops(model: WallXConfig, sample: Batch, use_flow: bool = True) -> int:
    """Of the forward pass of one sample."""
    return sum(product.flops for product in products(model, sample, use_flow))


def update_flops(model: WallXConfig, sample: Batch, trainable: Callable[[str], bool], use_flow: bool = True) -> int:
    """Of one sample's share of an update, forward and backward.

    trainable: whether the parameter at a path is trained.
    """
    trained = {"vision": False, "action": False}
    for path in filter(trainable, tree.flatten(abstract_params(model))):
        trained[path.split("/")[0]] = True
    total = 0
    for part, path, flops in products(model, sample, use_flow):
        # Gradients pass the decoder whatever is trained: the action expert sits in every layer of it.
        passes = trained.get(part, True) or path == "action/proj_back/kernel"
        if path is None:
            total += flops * (3 if passes else 1)
        else:
            total += flops * (1 + (passes and not path.startswith(READ_DATA)) + trainable(path))
    return total


def peak_tflops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device; None for one that is not in the table."""
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, device_kind)), None)


def rates(flops_per_s: float, mesh: Mesh) -> dict[str, float]:
    """{"tflops_per_device"}, and where the device's peak is known {"mfu"}, a share of its bfloat16 peak.

    flops_per_s: model FLOPs of the whole run per second.
    """
    achieved = flops_per_s / mesh.size / 1e12
    peak = peak_tflops(mesh.devices.flat[0].device_kind)
    return {"tflops_per_device": achieved} | ({} if peak is None else {"mfu": achieved / peak})
