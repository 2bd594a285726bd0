"""Load the target of an evaluation: a policy, and the frames held out from its training."""

import argparse
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wallx_jax.checkpoints.source import open_source
from wallx_jax.config import default_config, recorded, resolve
from wallx_jax.data.datasets import DatasetSpec
from wallx_jax.data.fetch import fetch
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo, read_info
from wallx_jax.data.pipeline import split_frames
from wallx_jax.data.validate import check_dataset
from wallx_jax.inference.load import load_policy
from wallx_jax.inference.policy import Policy
from wallx_jax.training import init
from wallx_jax.utils.files import unusable_folder


@dataclass(frozen=True)
class EvalTarget:
    """A policy and the data to evaluate it on.

    Attributes:
        policy: the policy to evaluate.
        info: metadata of the dataset.
        held_out: the frames held out from training; all frames if none were held out.
        folder: the checkpoint's step directory, or the model directory.
    """

    policy: Policy
    info: DatasetInfo
    held_out: LeRobotSource
    folder: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint, --dataset, --robot and --config to the parser of an evaluation script."""
    parser.add_argument(
        "--checkpoint", required=True, help="run or checkpoint directory, Wall-X model directory or hub repo id"
    )
    parser.add_argument("--dataset", help="LeRobot dataset: directory or repo id; default: the one it was trained on")
    parser.add_argument("--robot", help="which dataset's robot, for a checkpoint trained on several datasets")
    parser.add_argument(
        "--config", help="training configuration, e.g. configs/aloha.py; describes the robot of a model directory"
    )


def output_folder(text: str) -> Path:
    """Parse an argument that names an output folder; reject an unusable one before anything is computed."""
    if why := unusable_folder(text):
        raise argparse.ArgumentTypeError(f"{why}; choose another folder")
    return Path(text).expanduser()


def load_eval_target(arguments: argparse.Namespace, numerics: Mapping[str, Any] | None = None) -> EvalTarget:
    """Load the policy and the data named by the arguments of `add_arguments`.

    A trained checkpoint stores its robot's settings and how its dataset was split. For a model directory without them,
    as published or as converted, both come from --config, or from the known mapping of --dataset.

    Args:
        arguments: parsed arguments.
        numerics: fields of models.config.Numerics to override.

    Raises:
        ValueError, FileNotFoundError, CheckpointError, WeightsError: something is missing or does not fit.
    """
    source = open_source(arguments.checkpoint)
    folder = source.folder
    if not source.has_processor:
        return _open_model_directory(folder, arguments, numerics)
    stored = recorded(source.run_config)
    if len(known := source.robots) > 1:
        if arguments.robot not in known:
            raise ValueError(
                f"--robot {arguments.robot}: {folder} was trained on several datasets; choose one of {known}"
            )
        first_only = {"dataset_root": None, "dataset_revision": None, "episodes": None}
        stored |= first_only | stored["datasets"][arguments.robot] if arguments.robot in stored["datasets"] else {}
    location = arguments.dataset or stored["dataset_root"] or stored["repo_id"]
    if location is None:
        raise ValueError(f"{folder} does not record its training dataset; give --dataset")
    if arguments.dataset:
        stored |= {"dataset_revision": None, "episodes": None}
    info = read_info(location, stored["dataset_revision"], stored["episodes"])
    policy = load_policy(folder, numerics=numerics, robot=arguments.robot)
    split = [stored[key] for key in ("train_test_split", "split_mode", "split_seed")]
    layout = policy.processor.config
    fetch(info, layout.camera_keys)
    frames = LeRobotSource(info, layout.horizon, layout.camera_keys, layout.state_key, layout.action_key)
    return EvalTarget(policy, info, _held_out(frames, *split), folder)


def _open_model_directory(
    folder: Path, arguments: argparse.Namespace, numerics: Mapping[str, Any] | None
) -> EvalTarget:
    config = _read_config(arguments.config) if arguments.config else default_config()
    config.pretrained_wallx_path, config.save_path = str(folder), config.save_path or "runs/evaluation"
    if arguments.dataset:
        config.repo_id, config.dataset_root = arguments.dataset, None
    if config.repo_id is None:
        raise ValueError(
            f"{folder} is a model directory and does not describe a robot: give --config=configs/NAME.py or --dataset"
        )
    for name, value in (numerics or {}).items():
        config.numerics[name] = value
    settings = resolve(config)
    info = read_info(settings.data.location, settings.data.revision, settings.data.episodes)
    settings = check_dataset(settings, info)
    data = settings.data
    cameras = [camera.key for camera in data.cameras]
    fetch(info, cameras)
    source = LeRobotSource(info, data.action_horizon, cameras, data.state_key, data.action_key)
    origin, (processor,) = init.plan_datasets([DatasetSpec("", 1.0, settings, source)])
    policy = Policy(origin.config, init.load_origin(origin, settings.loop.seed), processor)
    held_out = _held_out(source, data.train_test_split, data.split_mode, data.split_seed)
    return EvalTarget(policy, info, held_out, folder)


def _held_out(source: LeRobotSource, ratio: float, mode: str, seed: int) -> LeRobotSource:
    """Select the frames held out from training; all frames if none were held out."""
    frames = split_frames(source.info, ratio, mode, seed)[1]
    return source.select(frames) if len(frames) else source


def _read_config(argument: str) -> ConfigDict:
    """Call get_config() of a configuration file, given as "FILE" or "FILE:ARGUMENT"."""
    file, _, option = argument.partition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"no such configuration file: {file}")
    spec = importlib.util.spec_from_file_location("configuration", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: not a Python file; give a configuration file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([option] if option else []))
