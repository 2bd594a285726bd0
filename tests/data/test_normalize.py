import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wallx_jax.data.normalize import Normalizer, NormStats, Stats, load_norm_stats, save_norm_stats

number = st.floats(-1e6, 1e6, width=32)


def stats(low, high, **kwargs):
    low, high = np.asarray(low, float), np.asarray(high, float)
    values = {"mean": (low + high) / 2, "std": (high - low) / 2, "q01": low, "q99": high, "min": low, "max": high}
    return Stats(**{**values, **kwargs})


@st.composite
def ranges(draw):
    pairs = draw(st.lists(st.tuples(number, number), min_size=1, max_size=6))
    return stats([min(p) for p in pairs], [max(p) for p in pairs])


@given(ranges(), st.data())
def test_values_within_the_range_come_back(s, data):
    share = data.draw(hnp.arrays(np.float64, (3, len(s)), elements=st.floats(0, 1)))
    x = s.q01 + share * (s.q99 - s.q01)
    normalizer = Normalizer(s, 20)
    y = normalizer.normalize(x)
    assert y.dtype == np.float32 and y.shape == (3, 20)
    assert (y[:, len(s) :] == 0).all()
    tolerance = 1e-6 * np.abs([s.q01, s.q99]).max() + np.finfo(np.float32).tiny  # subnormal numbers lose digits
    np.testing.assert_allclose(normalizer.unnormalize(y), x, rtol=1e-6, atol=tolerance)


@given(ranges(), st.data())
def test_always_finite_and_clamped(s, data):
    anything = st.floats(width=32, allow_nan=True, allow_infinity=True)
    x = data.draw(hnp.arrays(np.float32, len(s), elements=anything))
    y = Normalizer(s, 8).normalize(x)
    assert np.isfinite(y).all() and (np.abs(y) <= 1).all()
    assert (y[: len(s)][~np.isfinite(x)] == 0).all()
    assert np.isfinite(Normalizer(s, 8).unnormalize(y)).all()


def test_what_float32_cannot_hold_is_infinite_without_a_warning():
    wide = Normalizer(stats([-3e38], [3e38]), 1)
    assert wide.unnormalize([9.0]) == np.inf and np.isnan(wide.unnormalize([np.nan]))


def test_upstream_formula():
    s, x = stats([-2.0, 1.0], [2.0, 5.0]), np.array([[1.0, 2.0], [9.0, -9.0]])
    expected = np.clip((x - s.q01) / (s.q99 - s.q01) * 2 - 1, -1, 1)
    np.testing.assert_array_equal(Normalizer(s, 2).normalize(x), expected.astype(np.float32))
    np.testing.assert_array_equal(Normalizer(s, 3).mask(), [1, 1, 0])


@pytest.mark.parametrize("jitter", [0.0, 1e-9, 5e-324])
def test_constant_dim(jitter):
    normalizer = Normalizer(stats([0.25], [0.25 + jitter]), 1)
    assert normalizer.normalize([0.25]) == pytest.approx(-1)
    for said in (-1.0, 0.3, 7.0):
        assert normalizer.unnormalize([said]) == pytest.approx(0.25)


def test_tiny_range_around_zero_does_not_overflow():
    normalizer = Normalizer(stats([0.0], [5e-324]), 1)
    assert normalizer.normalize([1.0]) == 1 and normalizer.normalize([-1.0]) == -1


def test_rarely_moving_dim_keeps_its_way_back():
    normalizer = Normalizer(stats([0.0], [0.0], max=np.ones(1)), 1)
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize([[0.0], [1.0]])), [[0.0], [1.0]])


def test_robot_wider_than_model():
    with pytest.raises(ValueError, match="26 dims.* 20 channels"):
        Normalizer(stats(np.zeros(26), np.ones(26)), 20)


def test_wrong_width():
    with pytest.raises(ValueError, match="expected 2 dims.*\\(3,\\)"):
        Normalizer(stats([0, 0], [1, 1]), 4).normalize(np.zeros(3))


def test_file_round_trip(tmp_path):
    before = NormStats(stats([0.1], [0.3], mean=[0.15]), stats([1, 2], [3, 4], max=np.array([9.0, 9.0])), "s", "a")
    save_norm_stats(tmp_path / "norm_stats.json", before)
    after = load_norm_stats(tmp_path, "s", "a")
    for part in ("state", "action"):
        for name in ("mean", "std", "q01", "q99", "min", "max"):
            np.testing.assert_array_equal(getattr(getattr(before, part), name), getattr(getattr(after, part), name))
    assert (after.state_key, after.action_key) == ("s", "a")


def test_absolute_actions_leave_the_file_as_it_was(tmp_path):
    part = stats([0.1], [0.3])
    save_norm_stats(tmp_path / "norm_stats.json", NormStats(part, part, "s", "a"))
    rows = {
        key: {name: getattr(part, name).tolist() for name in ("mean", "std", "q01", "q99", "min", "max")}
        for key in "sa"
    }
    assert (tmp_path / "norm_stats.json").read_text() == json.dumps({"norm_stats": rows}, indent=2) + "\n"


def test_relative_actions_are_on_record(tmp_path):
    part = stats([0.1, 0.2], [0.3, 0.4])
    save_norm_stats(tmp_path, NormStats(part, part, "s", "a", (1, -1), 8))
    read = load_norm_stats(tmp_path, "s", "a")
    assert (read.relative_to, read.horizon) == ((1, -1), 8)
    read.check_relative((1, -1), 8)
    for relative_to, horizon in (((1, -1), 9), ((0, -1), 8), ((), 8)):
        with pytest.raises(ValueError, match=r"are for actions relative .*\{0: 1\} over 8 steps; expected statistics"):
            read.check_relative(relative_to, horizon)
    absolute = NormStats(part, part, "s", "a")
    absolute.check_relative((), 8)
    with pytest.raises(ValueError, match="are for absolute actions; expected statistics .* over 8 steps"):
        absolute.check_relative((1, -1), 8)
    content = json.loads((tmp_path / "norm_stats.json").read_text()) | {"relative_actions": {"horizon": 8}}
    (tmp_path / "norm_stats.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'relative_actions' needs relative_to and horizon"):
        load_norm_stats(tmp_path, "s", "a")


def test_upstream_file_without_min_and_max(tmp_path):
    row = {"mean": [0], "std": [1], "q01": [-1], "q99": [1]}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"observation.state": row, "actions": row}}))
    loaded = load_norm_stats(tmp_path)
    assert (loaded.state_key, loaded.action_key) == ("observation.state", "actions")
    assert loaded.action.max == [1]


def test_layout_by_robot(tmp_path):
    row = {"min": [-3], "q01": [-1], "q99": [1], "max": [3], "delta": [6], "delta_q99_q01": [2]}
    file = tmp_path / "stats.json"
    file.write_text(json.dumps({"x2": {"state": row, "action": row}, "arx": {"state": row, "action": row}}))
    loaded = load_norm_stats(file, "state", "action", robot="x2")
    assert loaded.action.min == [-3] and loaded.action.q01 == [-1]
    with pytest.raises(ValueError, match="robot.*\\['arx', 'x2'\\]"):
        load_norm_stats(file, "state", "action")


def test_lerobots_own_stats(tmp_path, caplog):
    row = {"min": [-3.0], "max": [3.0], "mean": [0.5], "std": [1.0], "q01": [-1.0], "q99": [2.0], "count": [9]}
    file = tmp_path / "stats.json"
    camera = {"observation.images.front": {"mean": [[[0.5]]], "q01": [[[0.0]]], "q99": [[[1.0]]]}}
    file.write_text(json.dumps({"observation.state": row, "action": row, "index": row} | camera))
    loaded = load_norm_stats(file)
    assert (loaded.state_key, loaded.action_key) == ("observation.state", "action")
    assert (loaded.action.min, loaded.action.q01, loaded.action.q99, loaded.action.std) == ([-3], [-1], [2], [1])
    assert "averages over the episodes" in caplog.text
    with pytest.raises(ValueError, match="q01 has shape"):
        load_norm_stats(file, "observation.images.front", "action")
    older = {name: value for name, value in row.items() if name not in ("q01", "q99")}
    file.write_text(json.dumps({"observation.state": older, "action": older}))
    with pytest.raises(ValueError, match="stats.json: 'observation.state' needs q01 and q99.*compute_norm_stats"):
        load_norm_stats(file)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q01": [2], "q99": [1]}, "q99 is below q01 at dims \\[0\\]"),
        ({"q01": [float("nan")], "q99": [1]}, "q01 is not finite at dims \\[0\\]"),
        ({"q01": [0], "q99": [float("inf")]}, "q99 is not finite"),
        ({"q01": [0, 0], "q99": [1]}, r"q01 has shape \(2,\), q99 \(1,\)"),
        ({"mean": [0], "std": [1]}, "needs q01 and q99, but has \\['mean', 'std'\\]"),
        ({"q01": ["a"], "q99": [1]}, "could not convert"),
        ([1, 2], "needs q01 and q99, but has list"),
    ],
)
def test_bad_entries(tmp_path, row, message):
    file = tmp_path / "norm_stats.json"
    file.write_text(json.dumps({"norm_stats": {"state": row, "action": row}}))
    with pytest.raises(ValueError, match=message) as error:
        load_norm_stats(file, "state", "action")
    assert str(file) in str(error.value)


def test_missing_key_lists_what_the_file_has(tmp_path):
    row = {"q01": [0], "q99": [1]}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": row, "actions": row}}))
    with pytest.raises(ValueError, match="no action 'action'; the file has \\['actions', 'state'\\]"):
        load_norm_stats(tmp_path, "state", "action")


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no normalization statistics at"):
        load_norm_stats(tmp_path)
    (tmp_path / "norm_stats.json").write_text("{")
    with pytest.raises(ValueError, match="norm_stats.json is not valid JSON"):
        load_norm_stats(tmp_path)
