import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wallx_jax.data import images


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((480, 640), 256, (196, 252)),
        ((640, 480), 256, (252, 196)),
        ((256, 256), 256, (252, 252)),
        ((84, 84), -1, (84, 84)),
        ((480, 640), -1, (476, 644)),
        ((70, 42), -1, (56, 56)),  # 2.5 and 1.5 blocks: halves go to the even neighbour
        ((10, 10), -1, (56, 56)),  # up to the minimum of 3136 pixels
        ((97, 101), 128, (112, 140)),  # 128 * 97 / 101 = 122.9 is truncated to 122, not rounded
        ((8000, 8000), -1, (3584, 3584)),  # down to the maximum of 12845056 pixels
        ((14, 2000), -1, (28, 1988)),
        ((20, 134), 100, (28, 112)),  # a side below half a block still gets one, as in qwen_vl_utils
    ],
)
def test_target_size(size, resolution, expected):
    assert images.target_size(*size, resolution) == expected


def test_the_shorter_side_is_truncated_and_a_square_is_portrait():
    # 43 * 97 / 100 = 41.71: truncated to 41 it rounds to one block of 28; 42 would round to two.
    assert images._scaled_size(97, 100, 43, "cam") == (41, 43)
    assert images._scaled_size(100, 97, 43, "cam") == (43, 41)
    assert images._scaled_size(33, 33, 100, "cam") == (100, 100)


def test_grid_and_token_count():
    assert images.grid(196, 252) == (1, 14, 18) and images.image_token_count(196, 252) == 63
    assert images.image_token_count(252, 252) == 81
    with pytest.raises(ValueError, match="196x250"):
        images.grid(196, 250)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(40, 200),
    width=st.integers(40, 200),
    resolution=st.sampled_from([-1, 84, 100, 128]),
    seed=st.integers(0, 3),
)
def test_resize_is_two_pillow_resizes_and_transformers_keeps_the_grid(height, width, resolution, seed):
    pytest.importorskip("torchvision")  # which transformers 5 asks for here
    from transformers import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    picture = noise(height, width, seed)
    expected = Image.fromarray(picture)
    if resolution != -1:
        long, short = max(height, width), int(resolution * min(height, width) / max(height, width))
        expected = expected.resize((resolution, short) if width == long and width != height else (short, resolution))
    h, w = smart_resize(expected.height, expected.width, 28, 3136, 12845056)
    expected = np.asarray(expected.resize((w, h)))
    ours = images.resize(picture, resolution)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(images.resize(Image.fromarray(picture), resolution), expected)
    assert ours.shape == (*images.target_size(height, width, resolution), 3) and ours.dtype == np.uint8
    assert ours.flags.writeable
    processor = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)
    theirs = processor(images=[Image.fromarray(ours)], return_tensors="np")
    assert tuple(theirs["image_grid_thw"][0]) == images.grid(*ours.shape[:2])


@settings(max_examples=100, deadline=None)
@given(height=st.integers(15, 5000), width=st.integers(15, 5000))
def test_smart_size_matches_transformers(height, width):
    """From half a block on; below it, transformers lets the side vanish and then enlarges the picture."""
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    try:
        expected = smart_resize(height, width, 28, 3136, 12845056)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio above 200"):
            images.target_size(height, width)
    else:
        assert images.target_size(height, width) == expected


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (noise(30, 40).transpose(2, 0, 1), r"wrist: shape \[3, 30, 40\]; channels come last"),
        (noise(30, 40) / 255.0, "wrist: dtype float64; give uint8"),
        (np.zeros((30, 40, 4), np.uint8), r"wrist: shape \[30, 40, 4\]; drop the alpha channel"),
        (np.zeros((30, 40), np.uint8), r"wrist: shape \[30, 40\]; expected \[height, width, 3\]"),
        (np.zeros((0, 40, 3), np.uint8), r"wrist: shape \[0, 40, 3\] has no pixels"),
        (np.zeros((2, 500, 3), np.uint8), "wrist: 2x500 .* aspect ratio above 200"),
        (Image.new("RGBA", (40, 30)), "wrist: Pillow image of mode 'RGBA'"),
        (Image.new("L", (40, 30)), "wrist: Pillow image of mode 'L'"),
        ([[1, 2]], "wrist: list; give a uint8"),
    ],
)
def test_wrong_pictures_name_the_camera(picture, message):
    with pytest.raises(ValueError, match=message):
        images.resize(picture, -1, name="wrist")


def test_pillow_pictures_that_cannot_be_read_name_the_camera(tmp_path):
    Image.fromarray(noise(60, 80)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(ValueError, match="wrist: the Pillow image cannot be"):
        images.resize(cut, name="wrist")
    with Image.open(tmp_path / "whole.png") as closed:
        pass
    with pytest.raises(ValueError, match="wrist: the Pillow image cannot be read"):
        images.size_of(closed, "wrist")


def test_resize_to_a_size():
    found = images.resize_to(noise(60, 80), (56, 84), "wrist")
    assert found.shape == (56, 84, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(images.resize_to(noise(60, 80), (56, 84)), images.resize(noise(60, 80)))
    with pytest.raises(ValueError, match="wrist: list; give a uint8"):
        images.resize_to([1], (56, 84), "wrist")


@pytest.mark.parametrize(
    ("size", "resolution", "message"),
    [
        ((0, 5), -1, "has no pixels"),
        ((30, 40), 0, "top: resolution is 0; give the longer side"),
        ((30, 40), -2, "resolution is -2"),
        ((2, 300), 100, "top: at resolution 100 .* thinner than one pixel"),
    ],
)
def test_wrong_sizes(size, resolution, message):
    with pytest.raises(ValueError, match=message):
        images.target_size(*size, resolution, name="top")
