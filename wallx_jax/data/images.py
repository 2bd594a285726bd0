"""Resize camera images for the vision tower, with the two resizes of upstream's training pipeline.

The first resize scales the longer side to a given resolution. The second rounds both sides to multiples of 28 pixels (a
2 x 2 block of 14-pixel patches, which becomes one token), like `smart_resize` of qwen_vl_utils. Pixel values stay
uint8; the model rescales them and extracts patches.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from wallx_jax.models.config import MERGE, PATCH

FACTOR = PATCH * MERGE
MAX_ASPECT = 200


class Limits(NamedTuple):
    """Bounds on height x width in pixels after rounding to multiples of 28.

    Attributes:
        smallest: minimum number of pixels.
        largest: maximum number of pixels.
    """

    smallest: int
    largest: int


IMAGE_LIMITS = Limits(4 * FACTOR**2, 16384 * FACTOR**2)  # from qwen_vl_utils and Qwen's preprocessor_config.json
VIDEO_LIMITS = Limits(128 * FACTOR**2, 768 * FACTOR**2)  # for each frame of a video, from qwen_vl_utils


def target_size(
    height: int, width: int, resolution: int = -1, name: str = "image", limits: Limits = IMAGE_LIMITS
) -> tuple[int, int]:
    """Return the size to which an image is resized.

    Args:
        height: of the original image, in pixels.
        width: of the original image, in pixels.
        resolution: pixels of the longer side before rounding to multiples of 28; -1 keeps the image's own size.
        name: name of the camera, for error messages.
        limits: bounds on the product of the returned sides.

    Returns:
        (height, width) in pixels, both multiples of 28.

    Raises:
        ValueError: the resolution is neither -1 nor positive, a side is below one pixel, or the aspect ratio exceeds
            200.
    """
    return _smart_size(*_scaled_size(height, width, resolution, name), name, limits)


def resize(
    image: np.ndarray | Image.Image, resolution: int = -1, name: str = "image", limits: Limits = IMAGE_LIMITS
) -> np.ndarray:
    """Apply both bicubic resizes with Pillow.

    Args:
        image: RGB as uint8 [H, W, 3] or a Pillow image of mode "RGB".
        resolution: as in `target_size`.
        name: as in `target_size`.
        limits: as in `target_size`.

    Returns:
        uint8 [h, w, 3] with (h, w) = target_size(H, W, resolution, name, limits).

    Raises:
        ValueError: `image` is anything else or cannot be read; also as `target_size`.
    """
    image = _checked(image, name)
    height, width = _scaled_size(image.height, image.width, resolution, name)
    # Two resizes are not equivalent to one: the intermediate image is rounded to uint8 and loses detail.
    if resolution != -1:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    height, width = _smart_size(height, width, name, limits)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def resize_to(image: np.ndarray | Image.Image, size: tuple[int, int], name: str = "image") -> np.ndarray:
    """Resize an image, as accepted by `resize`, once bicubically to uint8 [*size, 3]. Raises as `resize` does."""
    height, width = size
    return np.array(_checked(image, name).resize((width, height), Image.Resampling.BICUBIC))


def size_of(image: np.ndarray | Image.Image, name: str = "image") -> tuple[int, int]:
    """Return (height, width) of an image as accepted by `resize`. Raises as `resize` does."""
    image = _checked(image, name)
    return image.height, image.width


def grid(height: int, width: int) -> tuple[int, int, int]:
    """Return the patch grid (frames, rows, columns) of a still image.

    Raises:
        ValueError: a side in pixels is not a positive multiple of 28.
    """
    if height <= 0 or width <= 0 or height % FACTOR or width % FACTOR:
        raise ValueError(f"image size {height}x{width} (height x width) is not a multiple of {FACTOR}; see target_size")
    return 1, height // PATCH, width // PATCH


def image_token_count(height: int, width: int) -> int:
    """Return the number of prompt tokens of an image of this size: one per 28 x 28 pixels."""
    return math.prod(grid(height, width)) // 4


def _scaled_size(height: int, width: int, resolution: int, name: str) -> tuple[int, int]:
    """Scale the longer side to `resolution` and truncate the other; a square counts as portrait, as upstream."""
    if min(height, width) < 1:
        raise ValueError(f"{name}: an image of {height}x{width} (height x width) has no pixels")
    if resolution == -1:
        return height, width
    if resolution < 1:
        raise ValueError(f"{name}: resolution is {resolution}; give the longer side in pixels, or -1 to keep the size")
    if width > height:
        scaled = int(resolution * height / width), resolution
    else:
        scaled = resolution, int(resolution * width / height)
    if min(scaled) < 1:
        raise ValueError(
            f"{name}: at resolution {resolution} an image of {height}x{width} (height x width) becomes thinner than "
            f"one pixel; raise the resolution"
        )
    return scaled


def _smart_size(height: int, width: int, name: str, limits: Limits) -> tuple[int, int]:
    """Return the nearest multiples of 28 within the pixel limits, at about the same aspect ratio."""
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"{name}: {height}x{width} (height x width) has an aspect ratio above {MAX_ASPECT}; crop it")
    # round() rounds halves to even, as the reference does: 42 pixels -> 2 x 28.
    sides = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width)]
    if math.prod(sides) > limits.largest:
        shrink = math.sqrt(height * width / limits.largest)
        sides = [max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width)]
    elif math.prod(sides) < limits.smallest:
        grow = math.sqrt(limits.smallest / (height * width))
        sides = [math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width)]
    return sides[0], sides[1]


def _checked(image: np.ndarray | Image.Image, name: str) -> Image.Image:
    """Convert to a Pillow RGB image, or raise an error that describes what was given instead."""
    image = _as_pillow(image, name)
    if max(image.size) < PATCH:
        raise ValueError(
            f"{name}: an image of {image.height}x{image.width} (height x width) pixels is smaller than one patch of "
            f"{PATCH} pixels; is it a camera frame?"
        )
    return image


def _as_pillow(image: np.ndarray | Image.Image, name: str) -> Image.Image:
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"{name}: Pillow image of mode {image.mode!r}; convert it to 'RGB'")
        try:
            image.load()  # Image.open reads no pixels
        except Exception as error:  # damaged, cut off, or its file is closed: Pillow raises many types
            reason = str(error) or type(error).__name__
            raise ValueError(f"{name}: the Pillow image cannot be read ({reason}); open it again") from None
        return image
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name}: {type(image).__name__}; give a uint8 [height, width, 3] array or a Pillow image")
    shape = list(image.shape)
    if image.dtype != np.uint8:
        raise ValueError(f"{name}: dtype {image.dtype}; give uint8 values 0..255 (scale floats in [0, 1] by 255)")
    if image.ndim == 3 and shape[2] == 3:
        if 0 in shape:
            raise ValueError(f"{name}: shape {shape} has no pixels")
        return Image.fromarray(image)
    hint = "expected [height, width, 3]"
    if image.ndim == 3 and shape[2] == 4:
        hint = "drop the alpha channel"
    elif image.ndim == 3 and shape[0] == 3:
        hint = "channels come last: transpose it to [height, width, 3]"
    raise ValueError(f"{name}: shape {shape}; {hint}")
