"""Random changes of training images: crop, rotation and colours. Never used for validation or acting."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from wallx_jax.config.schema import AugmentConfig
from wallx_jax.data.batch import Batch

COLOURS = (
    ("brightness", ImageEnhance.Brightness),
    ("contrast", ImageEnhance.Contrast),
    ("saturation", ImageEnhance.Color),
)


@dataclass(frozen=True)
class Augment:
    """Changes the images of one sample; each camera on its own. For `grain.MapDataset.random_map`, whose generator
    depends on the seed and the sample's place in the run alone: not on workers, nor on what was drawn before.

    config: strengths. views: the cameras, in the order of the images.
    """

    config: AugmentConfig
    views: tuple[str, ...]

    def __call__(self, sample: Batch, rng: np.random.Generator) -> Batch:
        """A sample without batch axis -> the same with other images, uint8 of the same sizes."""
        images = (self._image(image, view, rng) for image, view in zip(sample.images, self.views, strict=True))
        return dataclasses.replace(sample, images=tuple(images))

    def _image(self, pixels: np.ndarray, view: str, rng: np.random.Generator) -> np.ndarray:
        config, image = self.config, Image.fromarray(pixels)
        # A wrist camera moves with the hand: where a thing is in its picture says where the hand is.
        if config.wrist_geometry or "wrist" not in view:
            image = _cropped_and_rotated(image, config.crop, config.rotate_deg, rng)
        for name, enhance in COLOURS:
            if strength := getattr(config, name):
                image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
        return np.array(image)


def _cropped_and_rotated(image: Image.Image, crop: float, rotate_deg: float, rng: np.random.Generator) -> Image.Image:
    """A window of `crop` times the sides, anywhere in the image, stretched to the image's size, then turned about its
    centre by up to `rotate_deg` either way. Interpolated once; corners that nothing covers are black."""
    if crop == 1 and rotate_deg == 0:
        return image
    width, height = image.size
    left, top = rng.uniform(0, 1 - crop, 2) * (width, height)
    angle = math.radians(rng.uniform(-rotate_deg, rotate_deg))
    across, along = crop * math.cos(angle), crop * math.sin(angle)
    # Pillow asks for the way back: from a place in the result to one in the image.
    x, y = width / 2, height / 2
    way_back = (across, along, left + crop * x - across * x - along * y,
                -along, across, top + crop * y + along * x - across * y)  # fmt: skip
    return image.transform(image.size, Image.Transform.AFFINE, way_back, Image.Resampling.BILINEAR)
