"""Several datasets in one run: what is settled before it, and in which order their samples come."""

import dataclasses

import numpy as np
import pytest
from helpers import tiny_run

from wallx_jax.config import resolve
from wallx_jax.data.datasets import open_datasets, unify_prompt_length
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.pipeline import DataLoader, eval_batches, mix_datasets, training_dataset
from wallx_jax.data.processor import Processor
from wallx_jax.utils.errors import ConfigError

VIEWS = {"face_view": "cam_high", "left_wrist_view": "cam_left_wrist"}


def config(dataset_dir, **entry):
    other = {"repo_id": str(dataset_dir), **entry}
    return tiny_run.run_config("model", dataset_dir, "out", datasets={"other": other})


# Settings


def errors_of(*args):
    with pytest.raises(ConfigError) as caught:
        resolve(config(*args[:1], **args[1]))
    return caught.value.errors


def test_an_entry_takes_over_what_it_does_not_set(dataset_dir):
    c = config(dataset_dir, weight=3, action_key="observation.state", camera_views={"wall_view": "cam_high"})
    c.norm_stats_path, c.dof_config, c.dataset_root = "stats.json", {"all": 14}, str(dataset_dir)
    run = resolve(c)
    (first_name, first_weight, first), (name, weight, other) = run.datasets()
    assert (first_name, first_weight, name, weight) == (dataset_dir.name, 1.0, "other", 3.0)
    assert first.data == run.data and first.data.norm_stats_path == "stats.json"
    assert other.data.action_key == "observation.state" and first.data.action_key == "action"
    assert [(camera.view, camera.key) for camera in other.data.cameras] == [("wall_view", "cam_high")]
    assert other.data.norm_stats_path is None and other.data.root is None, "those are of the first alone"
    assert other.robot == first.robot and other.data.action_horizon == first.data.action_horizon


def test_an_entry_may_put_its_robot_together_differently(dataset_dir):
    state, action = {"arm": "observation.state[7:14]"}, {"grip": "action[6:7]", "arm": "action[7:14]"}
    entry = {"dof_config": action, "agent_pos_config": state, "relative_action_keys": ("arm",)}
    first, other = (part.settings for part in open_datasets(resolve(config(dataset_dir, **entry))))
    assert (first.data.action_key, first.robot.relative_to()) == ("action", ())
    assert other.data.action_key == "action[6:14]" and other.data.state_key == "observation.state[7:14]"
    assert other.robot.relative_to() == (-1, *range(7))


def test_what_does_not_fit_several_datasets_is_one_error(dataset_dir):
    c = config(dataset_dir, dof_config={"arm": "action[0:20]"})
    c.camera_views = {"face_view": "nowhere"}
    with pytest.raises(ConfigError) as caught:
        open_datasets(resolve(c))
    assert [error.split(" = ")[0] for error in caught.value.errors] == [
        "camera_views.face_view", "datasets.other: camera_views.face_view", "datasets.other: dof_config.arm",
    ]  # fmt: skip
    assert str(caught.value).count("synthetic offers") == 1, "the same dataset"


def test_cameras_of_an_entry_keep_their_order(dataset_dir):
    views = {"left_wrist_view": "cam_left_wrist", "face_view": "cam_high"}
    (_, _, other) = resolve(config(dataset_dir, camera_views=views)).datasets()[1]
    assert [camera.view for camera in other.data.cameras] == list(views)


def test_the_prompt_is_that_of_all_and_names_the_views_of_all(dataset_dir):
    c = config(dataset_dir, camera_views={"elbow": "cam_high"}, resolution={"elbow": 84})
    c.prompt.system, c.prompt.view_names = "Act.", {"elbow": "elbow view"}
    first, other = (part.data.prompt for _, _, part in resolve(c).datasets())
    assert first == other and (first.system, first.view_label("elbow")) == ("Act.", "elbow view")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"prompt": {"system": "x"}}, ["datasets.other.prompt", "not a setting of one dataset"]),
        ({"weight": 0}, ["datasets.other.weight = 0", "above 0"]),
        ({"weight": "much"}, ["datasets.other.weight", "much"]),
        ({"learning_rate": 1.0}, ["datasets.other.learning_rate", "not a setting of one dataset"]),
        ({"camera_veiws": VIEWS}, ["datasets.other.camera_veiws", 'did you mean "camera_views"']),
        ({"camera_views": {"face_view": 3}}, ["datasets.other.camera_views.face_view = 3"]),
        ({"state_key": 3}, ["datasets.other.state_key = 3", "str"]),
        ({"repo_id": ""}, ["datasets.other", "repo_id"]),
        ({"predict_action_keys": ("hand",), "dof_config": {"arm": 14}}, ["datasets.other.predict_action_keys", "hand"]),
    ],
)
def test_a_wrong_entry_is_one_error(dataset_dir, entry, words):
    (error,) = errors_of(dataset_dir, entry)
    assert all(word in error for word in words), error


def test_an_error_of_the_whole_run_is_said_once(dataset_dir):
    c = config(dataset_dir)
    c.learning_rate = -1.0
    with pytest.raises(ConfigError) as caught:
        resolve(c)
    assert len([error for error in caught.value.errors if "learning_rate = -1" in error and "must be" in error]) == 1
    c = tiny_run.run_config("model", dataset_dir, "out", datasets={dataset_dir.name: {"repo_id": str(dataset_dir)}})
    with pytest.raises(ConfigError, match="first dataset has this name"):
        resolve(c)


def test_what_does_not_fit_names_the_dataset(dataset_dir):
    with pytest.raises(ConfigError, match="datasets.other: camera_views.face_view = 'nowhere'.*cam_high"):
        open_datasets(resolve(config(dataset_dir, camera_views={"face_view": "nowhere"})))
    with pytest.raises(FileNotFoundError, match="nobody/nothing"):
        open_datasets(resolve(config(dataset_dir, repo_id="nobody/nothing")))


# Layout


@pytest.fixture(scope="module")
def parts(dataset_dir):
    return open_datasets(resolve(config(dataset_dir, weight=0.5)))


@pytest.fixture(scope="module")
def processors(parts, tmp_path_factory):
    from wallx_jax.data.build import build_processor, load_stats

    tokenizer = tiny_run.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = tokenizer.with_wallx_tokens(None)
    return [
        build_processor(part.settings, part.source, tokenizer, None, load_stats(part.settings, part.source), 20, 20)
        for part in parts
    ]


def test_dims_are_called_what_the_dataset_calls_them(processors, parts, dataset_dir):
    from wallx_jax.data.build import build_processor

    assert processors[0].names == tuple(f"joint_{dim}" for dim in range(14))
    robot = {"dof_config": {"left": 7, "right": 7}, "predict_action_keys": ("right",)}
    (part,) = open_datasets(resolve(tiny_run.run_config("model", dataset_dir, "out", **robot)))
    tokenizer, stats = processors[0].tokenizer, processors[0].stats
    partly = build_processor(part.settings, part.source, tokenizer, None, stats, 20, 20)
    assert partly.names == processors[0].names and not partly.predicted[:7].any()
    decoded = partly.decode_actions(np.zeros((4, 20)), np.arange(14))
    np.testing.assert_array_equal(decoded[:, :7], np.tile(np.arange(7), (4, 1)))


def changed(processor, **layout):
    config = dataclasses.replace(processor.config, **layout)
    return Processor(config, processor.tokenizer, processor.stats, processor.fast)


def test_the_longest_prompt_gives_the_layout(parts, processors):
    longer = processors[1].config.prompt_length + 5
    first, second = unify_prompt_length(parts, [processors[0], changed(processors[1], prompt_length=longer)])
    assert first.config.prompt_length == second.config.prompt_length == longer
    image = [np.zeros((*size, 3), np.uint8) for size in first.config.image_sizes]
    sample = first.encode(image, np.zeros(14), "open the cabinet", resized=True)
    assert sample.tokens.shape == (longer,) and not sample.token_mask[:5].any()


def test_pictures_of_other_sizes_are_one_error(parts, processors):
    other = changed(processors[1], image_sizes=((56, 56), (56, 56)))
    with pytest.raises(ConfigError, match=r"datasets.other: .*56x56, 56x56 .*those of synthetic to 56x84, 56x56"):
        unify_prompt_length(parts, [processors[0], other])


def test_each_robot_has_its_own_statistics_on_disk(processors, tmp_path):
    from wallx_jax.data.processor import robots

    assert robots(tmp_path) == []
    other = Processor(processors[1].config, processors[1].tokenizer, tiny_run.unit_stats(14))
    processors[0].save(tmp_path)
    processors[0].save_as(tmp_path, "first")
    other.save_as(tmp_path, "other")
    assert robots(tmp_path) == ["first", "other"]
    for name, processor in ((None, processors[0]), ("first", processors[0]), ("other", other)):
        read = Processor.from_dir(tmp_path, name)
        np.testing.assert_array_equal(read.stats.action.q99, processor.stats.action.q99)
        assert read.config == processor.config


# Order


@pytest.fixture(scope="module")
def streams(parts, processors):
    sources = [LeRobotSource(part.info, 4, [], frames=frames)
               for part, frames in zip(parts, (np.arange(12), np.arange(12, 26)), strict=True)]  # fmt: skip
    blind = [changed(p, views=(), camera_keys=(), resolutions=(), image_sizes=()) for p in processors]
    return sources, blind


def stream(streams, weights, seed=3):
    parts = [
        training_dataset(source, processor, seed, dataset=i)
        for i, (source, processor) in enumerate(zip(*streams, strict=True))
    ]
    return mix_datasets(parts, weights)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    for a, b in zip(batches, others, strict=True):
        np.testing.assert_array_equal(a.dataset, b.dataset)
        np.testing.assert_array_equal(a.state, b.state)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.25), (0.3, 0.7)])
def test_weights_are_shares_of_every_stretch(streams, weights):
    numbers = np.array([stream(streams, weights)[i].dataset for i in range(400)])
    share = weights[1] / sum(weights)
    for start in range(0, 400, 40):
        assert abs((numbers[start : start + 40] == 1).sum() - 40 * share) <= 1.5


def test_every_dataset_goes_through_all_of_its_frames(streams):
    items = [stream(streams, (1.0, 0.5))[i] for i in range(36)]
    for number, processor, source in zip((0, 1), streams[1], streams[0], strict=True):
        states = np.array([item.state for item in items if item.dataset == number])[: len(source)]
        expected = np.array([processor.state.normalize(source.low_dim(i).state) for i in range(len(source))])
        seen = [np.flatnonzero((expected == state).all(axis=1)) for state in states]
        assert len({int(places[0]) for places in seen}) == len(states), "no frame twice before all were seen once"


def test_resume_is_exact(streams):
    iterator = DataLoader(stream(streams, (1.0, 0.4)), 4)
    take(iterator, 5)
    place = iterator.get_state()
    expected = take(iterator, 6)
    again = DataLoader(stream(streams, (1.0, 0.4)), 4)
    again.set_state(place)
    assert_same(take(again, 6), expected)
    other = DataLoader(stream(streams, (1.0, 0.4), seed=4), 4)
    with pytest.raises(AssertionError):
        assert_same(take(other, 5), take(DataLoader(stream(streams, (1.0, 0.4)), 4), 5))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_workers_change_nothing(streams):
    alone = take(DataLoader(stream(streams, (1.0, 0.4)), 4), 6)
    iterator = DataLoader(stream(streams, (1.0, 0.4)), 4, num_workers=2)
    try:
        assert_same(take(iterator, 6), alone)
    finally:
        iterator.close()


def test_one_dataset_has_no_numbers(streams):
    (source, _), (processor, _) = streams
    only = training_dataset(source, processor, 0)
    assert mix_datasets([only], [1.0]) is only and only[0].dataset is None
    assert next(DataLoader(only, 2)).dataset is None
    assert next(eval_batches(source, processor, 2)).batch.dataset is None
    assert next(eval_batches(source, processor, 2, dataset=1)).batch.dataset.tolist() == [1, 1]
