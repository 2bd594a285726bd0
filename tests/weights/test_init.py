import ml_dtypes
import numpy as np
import pytest
from helpers.tiny_models import SMALL, random_params

from wallx_jax.models.params import abstract_params
from wallx_jax.utils import tree
from wallx_jax.weights.init import init_param, resize_vocabulary, widen_channels

UNTIED = SMALL.replace(text={"tie_word_embeddings": False})


def check_shapes(config, params):
    expected = {path: (x.shape, x.dtype) for path, x in tree.flatten(abstract_params(config)).items()}
    assert {path: (x.shape, x.dtype) for path, x in tree.flatten(params).items()} == expected


@pytest.mark.parametrize("old", [SMALL, UNTIED, UNTIED.replace(numerics={"param_dtype": "bfloat16"})])
@pytest.mark.parametrize("rows", [60, 90, 130])
def test_rows_are_cut_and_appended(old, rows):
    params = random_params(old)
    config, resized = resize_vocabulary(old, params, rows)
    assert config == old.replace(text={"vocab_size": rows})
    check_shapes(config, resized)
    kept = min(rows, 90)
    np.testing.assert_array_equal(resized["embed"]["embedding"][:kept], params["embed"]["embedding"][:kept])
    if not old.text.tie_word_embeddings:
        np.testing.assert_array_equal(resized["lm_head"]["kernel"][:, :kept], params["lm_head"]["kernel"][:, :kept])


def test_new_rows_scatter_around_the_mean_as_transformers_has_it():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((64, 64)).astype(np.float32) * 1000  # channels that vary together, large enough to see
    params = random_params(SMALL)
    params["embed"]["embedding"] = table = params["embed"]["embedding"] @ mixing
    _, resized = resize_vocabulary(SMALL, params, 40_090)
    new = resized["embed"]["embedding"][90:].astype(np.float64)
    mean, covariance = table.mean(0), np.cov(table.T, bias=True)
    spread = np.sqrt(1e-9 * np.diag(covariance))
    assert (np.abs(new.mean(0) - mean) < 0.1 * spread + 1e-6 * np.abs(mean).max()).all()
    error = np.abs(np.cov(new.T) - 1e-9 * covariance) / np.outer(spread, spread)
    assert error.max() < 0.25  # of sampling 1024 of the old rows
    assert len(np.unique(new, axis=0)) == len(new)


def test_other_leaves_are_passed_on():
    params = random_params(SMALL)
    _, resized = resize_vocabulary(SMALL, params, 60)
    assert resized["decoder"]["norm"]["scale"] is params["decoder"]["norm"]["scale"]


@pytest.mark.parametrize("rows", [0, -3])
def test_rows_must_be_positive(rows):
    with pytest.raises(ValueError, match="must be positive"):
        resize_vocabulary(SMALL, random_params(SMALL), rows)


def test_wider_robots_leave_old_channels_as_they_were():
    params = random_params(SMALL)
    with pytest.warns(UserWarning, match="26 action and 23 state channels, the checkpoint 20 and 20"):
        config, wide = widen_channels(SMALL, params, 26, 23)
    assert (config.action.action_dim, config.action.state_dim) == (26, 23)
    check_shapes(config, wide)
    rng = np.random.default_rng(0)

    def head(heads, values, mask):
        return np.concatenate([values, mask], axis=-1) @ heads["kernel"]

    for name, width in (("w1", 26), ("propri_proj", 23)):
        values, mask = rng.standard_normal((4, 20), np.float32), rng.integers(0, 2, (4, 20)).astype(np.float32)
        padded = [np.pad(x, ((0, 0), (0, width - 20))) for x in (values, mask)]
        expected = head(params["action"][name], values, mask)
        np.testing.assert_allclose(head(wide["action"][name], *padded), expected, rtol=1e-5, atol=1e-5)
        new = np.delete(wide["action"][name]["kernel"], np.r_[0:20, width : width + 20], axis=0)
        assert 0.015 < new.std() < 0.025
    back = wide["action"]["proj_back"]["kernel"]
    np.testing.assert_array_equal(back[:, :20], params["action"]["proj_back"]["kernel"])
    assert 0.015 < back[:, 20:].std() < 0.025


def test_enough_channels_change_nothing():
    params = random_params(SMALL)
    config, same = widen_channels(SMALL, params, 20, 14)
    assert config is SMALL and same is params


def test_a_model_without_action_side_cannot_be_widened():
    with pytest.raises(ValueError, match="no action side"):
        widen_channels(SMALL.replace(action={"intermediate_size": None}), {}, 26, 26)


def test_fresh_weights_depend_on_path_and_seed():
    a, b = (init_param(path, (50, 50), np.float32, SMALL, 0) for path in ("a", "b"))
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, init_param("a", (50, 50), np.float32, SMALL, 1))
    np.testing.assert_array_equal(a, init_param("a", (50, 50), np.float32, SMALL, 0))
    assert init_param("a", (2,), ml_dtypes.bfloat16, SMALL, 0).dtype == ml_dtypes.bfloat16
