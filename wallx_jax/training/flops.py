"""Count the model FLOPs of an update from shapes, and compute the model FLOPs utilization (MFU) of a run.

Only the multiplications and additions of matrix products are counted, 2 per weight and token (PaLM, arXiv 2204.02311,
appendix B). A trained layer costs three times its forward pass: the forward pass itself, the gradient of its input, and
the gradient of its weights. A frozen layer has no weight gradient, and the vision tower has no backward pass if nothing
in it is trained. Recomputation (`numerics.remat`), norms, softmax, rotary embeddings and the optimizer are not counted.
Attention counts every score, masked or not, and padding counts as tokens. Every layer counts for all tokens, although
with unrolled layers the last one is computed only for tokens that have a loss.

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

# Peak TFLOP/s of one device for dense bfloat16 products with float32 accumulation, by JAX's `device_kind`; first match
# wins.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"A100", 312),  # NVIDIA A100 Tensor Core GPU datasheet
    (r"H100 NVL", 835),  # NVIDIA H100 Tensor Core GPU datasheet: half the figures given with sparsity
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
READ_DATA = ("vision/patch_embed/", "action/propri_proj/", "action/w1/")  # their inputs are data and need no gradient


class Product(NamedTuple):
    """Matrix products of one sample's forward pass.

    Attributes:
        part: top-level part of the model, e.g. "vision" or "decoder".
        parameter: parameter path; None for attention scores and values, which have no parameter.
        flops: FLOPs of the forward pass.
    """

    part: str
    parameter: str | None
    flops: int


def products(model: WallXConfig, sample: Batch, use_flow: bool = True) -> Iterator[Product]:
    """Yield the matrix products of one sample's forward pass.

    Args:
        model: model config.
        sample: arrays or shapes without a batch axis.
        use_flow: include the action tokens.
    """
    vision, text = model.vision, model.text
    grids = [(x.shape[0] // vision.patch_size, x.shape[1] // vision.patch_size) for x in sample.images]
    patches = sum(rows * columns for rows, columns in grids)
    prefix, window = sample.tokens.shape[0], sample.labels.shape[0]
    horizon = sample.actions.shape[0] if use_flow else 0

    def tokens(path: str) -> float:
        """Return the number of rows multiplied by this matrix."""
        if path.startswith("vision/"):
            return patches / vision.spatial_merge_size**2 if path.startswith("vision/merger/") else patches
        if path.startswith("decoder/"):
            expert = {"vlm": prefix, "action": horizon}
            return expert[path.split("/")[3]] if "/mlp/" in path else prefix + horizon
        if path.startswith("action/propri_proj/"):
            return 1
        if path.startswith("action/w2/"):
            return horizon + 1 if horizon else 0  # action tokens and flow time, each zero-padded in the other's half
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


def update_flops(model: WallXConfig, sample: Batch, trainable: Callable[[str], bool], use_flow: bool = True) -> int:
    """Return one sample's FLOPs in an update, forward and backward.

    Args:
        model: model config.
        sample: arrays or shapes without a batch axis.
        trainable: returns whether the parameter at a path is trained.
        use_flow: include the action tokens.
    """
    trained = {"vision": False, "action": False}
    for path in filter(trainable, tree.flatten(abstract_params(model))):
        trained[path.split("/")[0]] = True
    total = 0
    for part, matrix, flops in products(model, sample, use_flow):
        # Gradients always pass through the decoder, whatever is trained: each of its layers has an action expert.
        passes = trained.get(part, True) or matrix == "action/proj_back/kernel"
        if matrix is None:
            total += flops * (3 if passes else 1)
        else:
            total += flops * (1 + (passes and not matrix.startswith(READ_DATA)) + trainable(matrix))
    return total


def peak_tflops(device_kind: str) -> float | None:
    """Return a device's dense bfloat16 peak in TFLOP/s; None if it is not in the table."""
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, device_kind)), None)


def rates(flops_per_s: float, mesh: Mesh) -> dict[str, float]:
    """Return {"tflops_per_device": ..., "mfu": ...}, without "mfu" if the device's peak is unknown.

    Args:
        flops_per_s: model FLOPs per second of the whole run.
        mesh: mesh of the run.

    Returns:
        TFLOP/s per device, and the fraction of its bfloat16 peak (MFU).
    """
    achieved = flops_per_s / mesh.size / 1e12
    peak = peak_tflops(mesh.devices.flat[0].device_kind)
    return {"tflops_per_device": achieved} | ({} if peak is None else {"mfu": achieved / peak})
