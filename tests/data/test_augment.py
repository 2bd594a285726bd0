"""Random changes of training images: what they change, by how much, and that places in a run fix them."""

import dataclasses

import numpy as np
import pytest
from helpers import synthetic, tiny_run
from PIL import Image

from wallx_jax.config import default_config
from wallx_jax.config.schema import AugmentConfig
from wallx_jax.data.augment import Augment
from wallx_jax.data.batch import Batch
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.pipeline import DataLoader, Encode, eval_batches, shuffled, training_dataset
from wallx_jax.data.processor import Processor, ProcessorConfig

VIEWS = ("face_view", "left_wrist_view")
NOTHING = AugmentConfig(crop=1.0, rotate_deg=0.0, brightness=0.0, contrast=0.0, saturation=0.0, wrist_geometry=False)
DEFAULT = AugmentConfig(**{k: v for k, v in default_config().augment.items() if k != "enabled"})
pytestmark = pytest.mark.filterwarnings("ignore:The video decoding and encoding capabilities of torchvision")


def sample(*images) -> Batch:
    return Batch(images, *[np.arange(3)] * 8)


def change(image, seed=0, view="face_view", **strengths):
    """One image under some changes alone."""
    augment = Augment(dataclasses.replace(NOTHING, **strengths), (view,))
    return augment(sample(image), np.random.default_rng(seed)).images[0]


@pytest.fixture(scope="module")
def picture():
    """A smooth picture, 56 x 84, with x in red and y in green."""
    y, x = np.mgrid[:56, :84]
    return np.stack([40 + 2 * x, 60 + 2 * y, np.full_like(x, 128)], axis=-1).astype(np.uint8)


def test_no_strength_is_no_change(picture):
    np.testing.assert_array_equal(change(picture), picture)


def test_every_camera_changes_on_its_own_and_nothing_else_does(picture):
    before = sample(picture, picture)
    after = Augment(DEFAULT, VIEWS)(before, np.random.default_rng(0))
    for a, b in zip(after.images, before.images, strict=True):
        assert a.dtype == np.uint8 and a.shape == b.shape and not np.array_equal(a, b)
    assert not np.array_equal(*after.images)
    assert all(getattr(after, f.name) is getattr(before, f.name) for f in dataclasses.fields(Batch)[1:])


def test_a_crop_is_a_stretched_window(picture):
    corners = set()
    for seed in range(20):
        cropped = change(picture, seed, crop=0.5).astype(float)
        red, green = cropped[28, :, 0], cropped[:, 42, 1]
        # x and y are the pixel values, so the window can be read off: half the slope, ends inside the picture.
        assert np.diff(red).mean() == pytest.approx(1, abs=0.05) and np.diff(green).mean() == pytest.approx(1, abs=0.05)
        assert red.min() >= picture[..., 0].min() and red.max() <= picture[..., 0].max()
        corners.add((red[0], green[0]))
    assert len(corners) > 15 and np.ptp([x for x, _ in corners]) > 40


def test_a_rotation_turns_about_the_centre(picture):
    turned = np.stack([change(picture, seed, rotate_deg=10.0) for seed in range(20)]).astype(float)
    centre = turned[:, 27:29, 41:43, :2].mean(axis=(1, 2))
    np.testing.assert_allclose(
        centre, np.broadcast_to(picture[27:29, 41:43, :2].mean(axis=(0, 1)), centre.shape), atol=1
    )
    # Red grows by 2 a pixel to the right: downwards it changes by 2 sin(angle).
    angles = np.degrees(np.arcsin(np.diff(turned[:, 20:36, 42, 0], axis=1).mean(axis=1) / 2))
    assert 5 < angles.max() < 10.5 and -10.5 < angles.min() < -5
    pillow = Image.fromarray(picture).rotate(-angles[0], Image.Resampling.BILINEAR)
    difference = np.abs(turned[0] - np.asarray(pillow))[10:-10, 15:-15]
    assert difference.max() <= 2, "Pillow turns the same way"


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_strengths(picture, name):
    def spread(image):
        image = image.astype(float)
        grey = image @ [0.299, 0.587, 0.114]
        return {"brightness": image.mean(), "contrast": grey.std(), "saturation": np.ptp(image, axis=-1).mean()}[name]

    factors = np.array([spread(change(picture, seed, **{name: 0.2})) for seed in range(40)]) / spread(picture)
    assert 0.79 < factors.min() < 0.9 and 1.1 < factors.max() < 1.21
    assert change(picture, **{name: 0.2}).shape == picture.shape


def test_wrist_cameras_keep_their_geometry(picture):
    moved = {"crop": 0.5, "rotate_deg": 5.0}
    np.testing.assert_array_equal(change(picture, view="left_wrist_view", **moved), picture)
    assert not np.array_equal(change(picture, view="left_wrist_view", wrist_geometry=True, **moved), picture)


# In the pipeline


@pytest.fixture(scope="module")
def source(dataset_info):
    return LeRobotSource(dataset_info, 3, list(synthetic.CAMERAS))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    tokenizer = tiny_run.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = tokenizer.with_wallx_tokens(None)
    config = ProcessorConfig(
        views=VIEWS, camera_keys=tuple(synthetic.CAMERAS), resolutions=(84, 56), image_sizes=((56, 84), (56, 56)),
        horizon=3, prompt_length=120,
    )  # fmt: skip
    return Processor(config, tokenizer, tiny_run.unit_stats(synthetic.DIMS))


def stream(source, processor, size=4, **options):
    return DataLoader(training_dataset(source, processor, 3, Augment(DEFAULT, VIEWS)), size, **options)


def assert_same(batches, others):
    for a, b in zip(batches, others, strict=True):
        np.testing.assert_array_equal(a.state, b.state)
        for image, other in zip(a.images, b.images, strict=True):
            np.testing.assert_array_equal(image, other)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_training_alone_is_augmented(source, processor):
    (batch,) = take(stream(source, processor), 1)
    (plain,) = take(DataLoader(training_dataset(source, processor, 3), 4), 1)
    np.testing.assert_array_equal(batch.state, plain.state)
    assert all(not np.array_equal(a, b) for a, b in zip(batch.images, plain.images, strict=True))
    held_out = next(eval_batches(source, processor, 4)).batch
    np.testing.assert_array_equal(held_out.images[0][1], Encode(processor)(source[1]).images[0])


def test_another_epoch_or_seed_changes_a_frame_otherwise(source, processor):
    few = LeRobotSource(source.info, 3, source.cameras, frames=np.array([4]))
    augment = Augment(DEFAULT, VIEWS)
    one, other = (training_dataset(few, processor, seed, augment) for seed in (0, 1))
    for a, b in ((one[0], one[1]), (one[0], other[0])):
        np.testing.assert_array_equal(a.state, b.state)
        assert not np.array_equal(a.images[0], b.images[0])
    assert shuffled(few, 0)[0].frame == shuffled(few, 0)[1].frame


def test_resume_is_exact(source, processor):
    iterator = stream(source, processor)
    take(iterator, 5)
    place = iterator.get_state()
    expected = take(iterator, 4)
    again = stream(source, processor)
    again.set_state(place)
    assert_same(take(again, 4), expected)


def test_hosts_share_the_samples(source, processor):
    (whole,) = take(stream(source, processor), 1)
    shares = [stream(source, processor, 2, shard_index=i, shard_count=2) for i in range(2)]
    parts = [next(share) for share in shares]
    for camera, image in enumerate(whole.images):
        np.testing.assert_array_equal(np.stack([part.images[camera] for part in parts], 1).reshape(image.shape), image)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_workers_change_nothing_and_resume_exactly(source, processor):
    alone = take(stream(source, processor), 7)
    iterator = stream(source, processor, num_workers=2)
    try:
        assert_same(take(iterator, 3), alone[:3])
        place = iterator.get_state()
    finally:
        iterator.close()
    again = stream(source, processor, num_workers=2)
    try:
        again.set_state(place)
        assert_same(take(again, 4), alone[3:])
    finally:
        again.close()
