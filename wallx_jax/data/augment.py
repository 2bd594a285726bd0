"""Augment training images with random crops, rotations and color changes; not used for validation or inference."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from wallx_jax.config.schema import AugmentConfig
from wallx_jax.data.batch import Batch

COLORS = (
    ("brightness", ImageEnhance.Brightness),
    ("contrast", ImageEnhance.Contrast),
    ("saturation", ImageEnhance.Color),
)


@dataclass(frozen=True)
class Augment:
    """Random augmentation of the images of one sample, drawn independently for each camera.

    Meant for `grain.MapDataset.random_map`, whose generator depends only on the seed and the sample's position in the
    run, not on the number of workers or on earlier draws.

    Attributes:
        config: augmentation strengths.
        views: camera views, in the order of the sample's images.
    """

    config: AugmentConfig
    views: tuple[str, ...]

    def __call__(self, sample: Batch, rng: np.random.Generator) -> Batch:
        """Return `sample`, which has no batch axis, with augmented images: uint8, of unchanged sizes."""
        images = (self._image(image, view, rng) for image, view in zip(sample.images, self.views, strict=True))
        return dataclasses.replace(sample, images=tuple(images))

    def _image(self, pixels: np.ndarray, view: str, rng: np.random.Generator) -> np.ndarray:
        config, image = self.config, Image.fromarray(pixels)
        # A wrist camera moves with the hand, so the position of an object in its image encodes where the hand is.
        if config.wrist_geometry or "wrist" not in view:
            image = _cropped_and_rotated(image, config.crop, config.rotate_deg, rng)
        for name, enhance in COLORS:
            if strength := getattr(config, name):
                image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
        return np.array(image)


def _cropped_and_rotated(image: Image.Image, crop: float, rotate_deg: float, rng: np.random.Generator) -> Image.Image:
    """Crop, resize back to the original size and rotate an image, with a single interpolation.

    The window is `crop` times as wide and as high as the image, at a random place. It is scaled to the image's size and
    rotated about its centre by up to `rotate_deg` degrees in either direction. Uncovered corners are black.
    """
    if crop == 1 and rotate_deg == 0:
        return image
    width, height = image.size
    left, top = rng.uniform(0, 1 - crop, 2) * (width, height)
    angle = math.radians(rng.uniform(-rotate_deg, rotate_deg))
    across, along = crop * math.cos(angle), crop * math.sin(angle)
    # Pillow expects the inverse mapping, from output to input coordinates.
    x, y = width / 2, height / 2
    way_back = (across, along, left + crop * x - across * x - along * y,
                -along, across, top + crop * y + along * x - across * y)  # fmt: skip
    return image.transform(image.size, Image.Transform.AFFINE, way_back, Image.Resampling.BILINEAR)
