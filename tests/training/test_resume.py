"""Settings of a run that goes on: what differs is refused by name, or acts and is told; what is the same passes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import synthetic, tiny_run

import wallx_jax.train
from wallx_jax.checkpoints.checkpointer import restore_params
from wallx_jax.checkpoints.stream import ModelReader
from wallx_jax.config import resolve
from wallx_jax.config.schema import OptimConfig
from wallx_jax.data.datasets import open_datasets
from wallx_jax.data.fast import FastTokenizer
from wallx_jax.data.normalize import load_norm_stats, save_norm_stats
from wallx_jax.models.config import Numerics
from wallx_jax.models.lora import is_adapter, merge_params
from wallx_jax.training import init, sharding
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.utils import tree
from wallx_jax.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]
NAMES = {f"joint_{i}": 1 for i in range(14)}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_devices(patch, 1)
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def qwen_dir(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model") / "qwen", qwen=True)


@pytest.fixture(scope="module")
def fast_dirs(tmp_path_factory):
    """Two FAST tokenizers of one size."""
    folders = [tmp_path_factory.mktemp("fast") / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        FastTokenizer.fit(np.random.default_rng(seed).uniform(-1, 1, (64, 4, 14)), vocab_size=400).save(folder)
    return folders


def save(config):
    """What a run with this configuration saves before its first update, with adapters that do something."""
    settings = resolve(config)
    specs = open_datasets(settings)
    source, processors = init.plan_datasets(specs)
    setup = wallx_jax.train.plan_run(config, specs, processors, source, sharding.make_mesh(settings.mesh), None)
    rng = np.random.default_rng(0)

    def leaf(path, x):
        return 0.1 * rng.standard_normal(x.shape, np.float32) if path.endswith("/lora_b") else x

    with wallx_jax.train.run_folder(setup), wallx_jax.train.open_data(setup) as data:
        state = wallx_jax.train.initial_state(setup, data.batches)
        state = dataclasses.replace(state, params=tree.map_with_path(leaf, state.params))
        with wallx_jax.train.open_outputs(setup, 0, data.batches) as outputs:
            outputs.save(0, state, None)
    return setup.save_path / "checkpoints" / "0"


def resumed(config, **changes):
    """Whatever is wrong with going on from the run of a configuration, with `changes`."""
    config = config.copy_and_resolve_references()
    config.resume.ckpt = "latest"
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    wallx_jax.train.run(config, dry_run=True)


def test_latest_is_found_in_the_home_directory(model_dir, dataset_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny_run.run_config(model_dir, dataset_dir, "~/run")
    save(config)
    config.resume.ckpt = "latest"
    assert init.resumable(resolve(config)).loop.resume_ckpt == "latest"
    resumed(config)


CONFIGS = {
    "aloha": "",
    "aloha_fast": "",
    "aloha_from_vlm": "1",
    "demo": "",
    "upstream_yaml": "config.yml",
}


def test_every_example_is_here():
    assert {file.stem for file in (ROOT / "configs").glob("*.py")} == CONFIGS.keys()


@pytest.mark.medium
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_configuration_goes_on(name, model_dir, qwen_dir, fast_dirs, dataset_dir, tmp_path, caplog):
    data = {"lerobot_config": {"repo_id": "x"}, "resolution": {"face_view": 84, "left_wrist_view": 56}}
    (tmp_path / "config.yml").write_text(yaml.safe_dump({"pretrained_wallx_path": "x", "data": data}))
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(str(tmp_path / CONFIGS[name]) if "yml" in CONFIGS[name] else CONFIGS[name])
    config.pretrained_wallx_path = str(qwen_dir if name in ("aloha_fast", "aloha_from_vlm") else model_dir)
    config.repo_id, config.save_path, config.frame_cache = str(dataset_dir), str(tmp_path / "run"), None
    config.camera_views = {"face_view": "cam_high", "left_wrist_view": "cam_left_wrist"}
    config.dof_config, config.agent_pos_config = NAMES, NAMES
    config.predict_action_keys = config.obs_action_keys = tuple(NAMES) if config.predict_action_keys else ()
    if config.action_tokenizer_path:
        config.action_tokenizer_path = str(fast_dirs[0])
    config.num_workers, config.compile_cache = 0, "off"
    save(config)
    caplog.clear()
    resumed(config)
    assert not [record for record in caplog.records if "continues" in record.getMessage() or "not used" in record.msg]


FIRST = {"lora__rank": 2, "lora__alpha": 8.0, "ema_decay": None, "predict_action_keys": ("arm",)}
ROBOT = {"dof_config": {"arm": 6, "rest": 8}, "agent_pos_config": {"arm": 6, "rest": 8}}


@pytest.fixture(scope="module")
def adapted(model_dir, dataset_dir, tmp_path_factory):
    """A run with adapters: (its configuration, its checkpoint)."""
    folder = tmp_path_factory.mktemp("run") / "adapted"
    config = tiny_run.run_config(model_dir, dataset_dir, folder, **ROBOT, **FIRST)
    return config, save(config)


@pytest.fixture(scope="module")
def speaking(qwen_dir, dataset_dir, fast_dirs, tmp_path_factory):
    """A run with FAST actions, likewise."""
    config = tiny_run.run_config(
        qwen_dir, dataset_dir, tmp_path_factory.mktemp("run") / "fast", use_fast_tokenizer=True, max_fast_tokens=40,
        action_tokenizer_path=str(fast_dirs[0]), action_expert_intermediate_size=24,
    )  # fmt: skip
    return config, save(config)


REFUSED = {
    "numerics.action_attention": ("causal", "bidirectional"),
    "numerics.mrope_layout": ("upstream_cuda", "qwen"),
    "numerics.flow_loss": ("valid", "all"),
    "numerics.param_dtype": ("bfloat16", "float32"),
    "numerics.compute_dtype": ("bfloat16", "float32"),
    "numerics.float32_islands": (False, True),
    "lora.rank": (4, 2),
    "lora.alpha": (16.0, 8.0),
    "lora.targets": (("decoder/layers/attn/",), ("decoder/layers/",)),
    "optimizer": ("adafactor", "adamw"),
    "train_action_heads": (False, True),
    "ema_decay": (0.9, None),
    "action_expert_intermediate_size": (64, 2048),
    "action_horizon": (5, 4),
    "predict_action_keys": (("rest",), ("arm",)),
    "obs_action_keys": (("arm",), ("arm", "rest")),
    "prompt.system": ("Act.", "You are a helpful assistant."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_shaped_the_run_is_refused(adapted, name):
    now, then = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        resumed(adapted[0], **{name.replace(".", "__"): now})
    (error,) = caught.value.errors
    assert error == (
        f"{name} = {now!r}, but the run of resume.ckpt has {then!r}: use that, or start a new run from its weights "
        "with resume.load_ckpt_only=True"
    )


OTHERWISE = {
    "resolution": ({"resolution__face_view": 112}, "resolution = .*'face_view': 112.* has .*'face_view': 84"),
    "order of cameras": (
        {"camera_views": {"left_wrist_view": "cam_left_wrist", "face_view": "cam_high"}},
        "camera_views = .'left_wrist_view: .*, but the run of resume.ckpt has .'face_view: ",
    ),
    "no adapters": ({"lora__rank": 0}, "lora.rank = 0, but .* has 2: use that"),
    "frozen": ({"freeze_vlm": True}, r"freeze_vlm \(train_action_expert_only\) = True, but .* has False"),
    "fast": ({"use_fast_tokenizer": True, "action_tokenizer_path": "FAST"}, "use_fast_tokenizer = True, but .* False"),
    "too short": ({"max_length": 40}, "max_length = 40: the longest prompt has .* raise max_length"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_samples_and_arrays_are_refused(adapted, fast_dirs, name):
    changes, match = OTHERWISE[name]
    changes = {key: str(fast_dirs[0]) if value == "FAST" else value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=match) as caught:
        resumed(adapted[0], **changes)
    assert len(caught.value.errors) == 1


def test_all_that_differs_is_listed(adapted):
    with pytest.raises(ConfigError) as caught:
        resumed(adapted[0], lora__alpha=1.0, optimizer="adafactor", predict_action_keys=(), action_horizon=5)
    assert [error.split(" = ")[0] for error in caught.value.errors] == [
        "lora.alpha", "optimizer", "action_horizon", "predict_action_keys"
    ]  # fmt: skip


def test_another_action_tokenizer_is_refused(speaking, fast_dirs, tmp_path):
    config, checkpoint = speaking
    FastTokenizer.from_dir(fast_dirs[0]).save(tmp_path / "copy")
    resumed(config, action_tokenizer_path=str(tmp_path / "copy"))
    resumed(config, action_tokenizer_path=str(checkpoint / "assets" / "fast"))
    with pytest.raises(
        ConfigError, match="action_tokenizer_path = .* is another FAST tokenizer than .*assets/fast, or"
    ):
        resumed(config, action_tokenizer_path=str(fast_dirs[1]))
    with pytest.raises(ConfigError, match="max_fast_tokens = 41, but the run of resume.ckpt has 40"):
        resumed(config, max_fast_tokens=41)
    with pytest.raises(ConfigError, match="action_expert_intermediate_size = 32, but the run of resume.ckpt has 24"):
        resumed(config, action_expert_intermediate_size=32)


def test_the_same_said_otherwise_goes_on(adapted, caplog):
    """All names or none, one group or several, defaults spelled out, numerics left to the checkpoint."""
    config, _ = adapted
    resumed(config, obs_action_keys=("rest", "arm"), train_action_expert_only=False)
    resumed(config, dof_config={"a": 2, "b": 4, "c": 8}, predict_action_keys=("b", "a"))
    resumed(config, numerics=dataclasses.asdict(Numerics(param_dtype="float32", compute_dtype="float32")))
    caplog.clear()
    resumed(config, numerics=dict.fromkeys(config.numerics))
    assert "continues" not in caplog.text


def test_numerics_that_came_with_the_weights_stay(dataset_dir, tmp_path):
    """A run that leaves them open has its model's, and so has the one that goes on."""
    model = tiny_run.write_model(tmp_path / "model")
    file = model / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"wallx_jax": said["wallx_jax"] | {"flow_loss": "valid"}}))
    config = tiny_run.run_config(model, dataset_dir, tmp_path / "run")
    save(config)
    resumed(config)
    resumed(config, numerics__flow_loss="valid")
    with pytest.raises(ConfigError, match="numerics.flow_loss = 'all', but the run of resume.ckpt has 'valid'"):
        resumed(config, numerics__flow_loss="all")


def test_settings_that_act_from_here_on_are_told(adapted, caplog):
    config, checkpoint = adapted
    resumed(
        config, learning_rate=5e-4, learning_rates=("attn/=1e-5",), numerics__remat="none",
        pretrained_wallx_path="gone",
    )  # fmt: skip
    (told,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert told == (
        "the run continues with other settings: numerics.remat was None, is 'none'; learning_rate was 0.001, is "
        "0.0005; learning_rates was (), is ('attn/=1e-5',)"
    )
    (unused,) = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert unused.startswith("pretrained_wallx_path = 'gone' is not used: ")
    config = config.copy_and_resolve_references()
    config.resume.ckpt, config.numerics.remat, config.numerics.masked_dims = str(checkpoint), "none", "held"
    origin, _ = init.plan_datasets(open_datasets(resolve(config)))
    assert (origin.config.numerics.remat, origin.config.numerics.masked_dims) == ("none", "held")


def test_statistics_are_compared_by_their_numbers(model_dir, dataset_dir, tmp_path):
    """A file with the numbers of the dataset is no change; other numbers are, also where no file is named any more."""
    computed = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "computed")
    own = save(computed) / "assets" / "norm_stats.json"
    stats = load_norm_stats(own)
    copy, other = tmp_path / "copy.json", tmp_path / "other.json"
    save_norm_stats(copy, stats)
    moved = dataclasses.replace(stats.state, q99=stats.state.q99 + np.eye(14)[3])
    save_norm_stats(other, dataclasses.replace(stats, state=moved))
    resumed(computed, norm_stats_path=str(copy))
    with pytest.raises(
        ConfigError, match=r"norm_stats_path = '.*other.json': .*\(q99 of state dim 3 is .*assets/norm_"
    ):
        resumed(computed, norm_stats_path=str(other))
    read = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "read", norm_stats_path=str(other))
    save(read)
    resumed(read)
    with pytest.raises(ConfigError, match="norm_stats_path = None: its statistics are computed from the dataset"):
        resumed(read, norm_stats_path=None)


def test_each_dataset_is_compared(model_dir, dataset_dir, tmp_path):
    small = synthetic.write_dataset(tmp_path / "small", dims=7)
    entry = {"repo_id": str(small), "weight": 0.5}
    config = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "run", batch_size_per_gpu=3,
                                 datasets={"seven": entry})  # fmt: skip
    save(config)
    resumed(config)
    table = {"dof_config": {"arm": 4, "hand": 3}, "predict_action_keys": ("arm",)}
    with pytest.raises(ConfigError) as caught:
        resumed(config, datasets={"seven": entry | table}, action_horizon=5)
    assert [error.split(" = ")[0] for error in caught.value.errors] == [
        "action_horizon", "datasets.seven: predict_action_keys"
    ]  # fmt: skip


RATES = {
    "learning_rate": {"learning_rate": 5e-4},
    "min_lr": {"min_lr": 2e-4},
    "num_warmup_steps": {"num_warmup_steps": 3},
    "weight_decay": {"weight_decay": 0.0},
    "action_expert_learning_rate": {"action_expert_learning_rate": 1e-4},
    "learning_rates": {"learning_rates": ("attn/=1e-5",)},
    "num_training_steps": {"num_training_steps": 50},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "stochastic_rounding": {"stochastic_rounding": False},
}


@pytest.mark.parametrize("name", RATES)
def test_the_optimizers_state_fits_other_rates(adapted, name):
    resumed(adapted[0], **RATES[name])


DECISIONS = {
    "compared": {"optimizer", "freeze_vlm", "train_action_heads", "lora"},
    "whether there is one is compared": {"ema_decay"},
    "acts": {
        "learning_rate", "min_lr", "warmup_steps", "action_expert_learning_rate", "weight_decay", "max_grad_norm",
        "learning_rates", "stochastic_rounding",
    },
}  # fmt: skip


def test_each_setting_of_the_optimizer_is_decided():
    assert {field.name for field in dataclasses.fields(OptimConfig)} == set().union(*DECISIONS.values())
    numerics = {field.name for field in dataclasses.fields(Numerics)}
    refused = {name.removeprefix("numerics.") for name in REFUSED if name.startswith("numerics.")}
    assert numerics == refused | {"remat", "masked_dims", "kernels"}


def loaded(origin, settings):
    """The training state that a new run starts with."""
    optimizer = make_optimizer(settings.optim, 10)
    return init.load_state(origin, optimizer, sharding.make_mesh(settings.mesh), settings.loop.seed)


ADAPTERS = {
    "the same": {},
    "alpha": {"lora__alpha": 3.0},
    "rank": {"lora__rank": 4},
    "rank and alpha in proportion": {"lora__rank": 4, "lora__alpha": 16.0},
    "targets": {"lora__targets": ("decoder/layers/attn/",)},
    "other targets": {"lora__targets": ("^vision/",), "lora__alpha": 2.0},
    "none": {"lora__rank": 0},
}


@pytest.mark.medium
@pytest.mark.parametrize("by", ["pretrained_wallx_path", "resume.load_ckpt_only"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_new_run_starts_with_the_policy_of_the_adapters(adapted, tmp_path, name, by):
    config, checkpoint = adapted
    config = config.copy_and_resolve_references()
    config.save_path = str(tmp_path / "run")
    if by == "pretrained_wallx_path":
        config.pretrained_wallx_path = str(checkpoint)
    else:
        config.resume.ckpt, config.resume.load_ckpt_only = str(checkpoint), True
    for key, value in ADAPTERS[name].items():
        config.lora[key.removeprefix("lora__")] = value
    settings = resolve(config)
    origin, _ = init.plan_datasets(open_datasets(settings))
    state = loaded(origin, settings)
    before = ModelReader(checkpoint)
    after = tree.flatten(merge_params(state.params, origin.config.lora))
    base = tree.flatten(restore_params(checkpoint))
    assert after.keys() == before.specs.keys()
    for path, kernel in after.items():
        np.testing.assert_allclose(kernel, before.read(path), atol=1e-6, err_msg=path)
    changed = [path for path in after if not np.array_equal(before.read(path), base[path])]
    assert changed, "the adapters do something"
    kept = any(is_adapter(path) and np.any(x) for path, x in tree.flatten(state.params).items() if "lora_b" in path)
    assert kept == (name in ("the same", "alpha")), "adapters of the same shapes go on, others begin"


@pytest.mark.medium
def test_adapters_are_merged_as_precisely_as_the_new_run_keeps_them(model_dir, dataset_dir, tmp_path):
    config = tiny_run.run_config(
        model_dir, dataset_dir, tmp_path / "run", lora__rank=2, numerics__param_dtype="bfloat16"
    )
    checkpoint = save(config)
    config.resume.ckpt, config.resume.load_ckpt_only = str(checkpoint), True
    config.lora.rank, config.numerics.param_dtype, config.save_path = 0, "float32", str(tmp_path / "other")
    settings = resolve(config)
    origin, _ = init.plan_datasets(open_datasets(settings))
    params = tree.flatten(loaded(origin, settings).params)
    flat = {path: np.asarray(x, np.float32) for path, x in tree.flatten(restore_params(checkpoint)).items()}
    module = "decoder/layers/attn/q"
    wanted = flat[f"{module}/kernel"] + 16 * flat[f"{module}/lora_a"] @ flat[f"{module}/lora_b"]
    np.testing.assert_allclose(params[f"{module}/kernel"], wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_new_rate_is_that_of_the_next_update(model_dir, dataset_dir, tmp_path, optimizer):
    """After two updates two more, at next to none: nothing moves, whereas at the rates of before everything does."""
    config = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "run", optimizer=optimizer, eval_interval=0,
                                 action_expert_learning_rate=2e-3)  # fmt: skip
    last = wallx_jax.train.run(config)
    after = {}
    for rate in (1e-3, 1e-20):
        config.resume.ckpt, config.save_path = str(last.parent / "2"), str(tmp_path / str(rate))
        config.learning_rate, config.min_lr, config.action_expert_learning_rate = rate, rate / 10, 2 * rate
        after[rate] = tree.flatten(restore_params(wallx_jax.train.run(config)))
        logged = [json.loads(line) for line in (Path(config.save_path) / "metrics.jsonl").read_text().splitlines()]
        assert all(rate / 10 < line["learning_rate"] <= rate for line in logged if "loss" in line)
    before, whole = tree.flatten(restore_params(last.parent / "2")), tree.flatten(restore_params(last))
    for path in before:
        np.testing.assert_array_equal(after[1e-3][path], whole[path], err_msg=path)
        np.testing.assert_array_equal(after[1e-20][path], before[path], err_msg=path)
        assert not np.array_equal(whole[path], before[path]), path
