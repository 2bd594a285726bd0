"""Check a LeRobot dataset before a long run: summarise its contents and report what would go wrong in training.

    python scripts/check_dataset.py --config=configs/aloha.py [--output=runs/check_dataset] [--config.key=value]
    python scripts/check_dataset.py --dataset=DIR_OR_REPO [--decode=200]

Takes the same settings as `python -m wallx_jax.train`. --dataset replaces the dataset of the configuration, or is used
without one: then the keys are those known for it, or observation.state and action with all cameras. --decode is the
approximate number of frames to decode, spread over all episodes, or "all".

Prints tables and findings, each with a remedy; writes report.json, contact_sheet.png (frames of a few episodes),
dimensions.png (histograms) and trace.png (state and action of an episode, one with a jump if there is one). Exit code 1
if there is an error among the findings. No weights are read.
"""

import functools
import json
import logging
import sys
import textwrap
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

from wallx_jax.config import default_config, resolve
from wallx_jax.config.command_line import CommandLineError, launch
from wallx_jax.config.robots import KEY_MAPPINGS
from wallx_jax.data.datasets import open_datasets
from wallx_jax.data.metadata import is_depth, read_info
from wallx_jax.data.validate import IMAGE_PREFIX
from wallx_jax.dataset_check import check, preflight
from wallx_jax.dataset_check.report import as_json, as_text
from wallx_jax.evaluation import plots
from wallx_jax.utils.errors import ConfigError, run_main
from wallx_jax.utils.files import write_text

# Scripts may define a flag of the same name and be imported into one program.
define = functools.partial(flags.DEFINE_string, allow_override=True)
define("dataset", None, "LeRobot dataset: directory or repo id; replaces that of --config")
define("output", "runs/check_dataset", "directory for report.json and the images")
define("decode", "200", 'about how many frames to decode, or "all"')


def main(config: ConfigDict | None) -> None:
    config = dataset_config() if config is None else config
    logging.getLogger("absl").setLevel(logging.WARNING)
    output, decode = Path(flags.FLAGS.output), _count(flags.FLAGS.decode)
    if flags.FLAGS.dataset:
        config.repo_id, config.dataset_root, config.dataset_revision = flags.FLAGS.dataset, None, None
        config.robot_name, config.datasets = None, {}
    config.save_path = str(output)
    run = resolve(config)
    preflight.check_folders(run)
    parts = open_datasets(run)
    failed = False
    for part in parts:
        report = check.check(part, decode)
        folder = output / part.name if len(parts) > 1 else output
        _write(report, folder)
        print(f"{as_text(report)}\n\npictures and report.json in {folder}\n")
        failed |= report.failed
    sys.exit(int(failed))


def dataset_config() -> ConfigDict:
    """Build the settings for --dataset without a configuration."""
    dataset = flags.FLAGS.dataset
    if dataset is None:
        raise CommandLineError("of what? Give --dataset=DIR_OR_REPO or --config=configs/NAME.py")
    config = default_config()
    config.repo_id, config.pretrained_wallx_path = dataset, "not read"
    if dataset not in KEY_MAPPINGS:
        try:
            info = read_info(dataset)
        except (OSError, ValueError) as error:
            raise CommandLineError(f"--dataset={dataset}: {error}") from error
        cameras = [key for key in info.camera_keys if not is_depth(info.features[key])]
        views = {key.removeprefix(IMAGE_PREFIX).replace(".", "_"): key for key in cameras}
        config.camera_views, config.resolution = views, dict.fromkeys(views, -1)
        config.prompt.view_names = dict.fromkeys(views, "view")  # any label: camera keys are never misspelt
    return config


def _count(decode: str) -> int | None:
    if decode == "all":
        return None
    if not decode.isdecimal():
        raise ConfigError(f'--decode={decode}: expected a number of frames, or "all"')
    return int(decode)


def _write(report: check.Report, folder: Path) -> None:
    info, look = report.info, report.look
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", json.dumps(as_json(report), indent=2) + "\n")
    state, action = report.tables.state, report.tables.action
    plots.dimensions(folder / "dimensions.png", [state, action])
    jumps = state.jumps + action.jumps
    median = info.episode_numbers[np.argsort(info.episode_lengths)[info.num_episodes // 2]]
    episode = jumps[0].episode if jumps else int(median)
    title = textwrap.shorten(f"episode {episode}: {report.instruction(episode)}", 100)
    plots.trace(folder / "trace.png", state, action, report.tables.pairs, info.frames_of(episode), title)
    if look.shown:
        plots.image_grid(folder / "contact_sheet.png", _contact_rows(report))


def _contact_rows(report: check.Report) -> list[list[tuple[str, np.ndarray]]]:
    """Return one row of (title, image) per episode and camera."""
    rows: dict[tuple[int, str], list[tuple[str, np.ndarray]]] = {}
    for (episode, frame, camera), image in sorted(report.look.shown.items(), key=lambda entry: entry[0]):
        row = rows.setdefault((episode, camera), [])
        row.append((f"episode {episode}, frame {frame}: {camera.removeprefix(IMAGE_PREFIX)}", image))
    for episode in {episode for episode, _ in rows}:
        row = rows[min(key for key in rows if key[0] == episode)]
        row[0] = (textwrap.fill(report.instruction(episode), 50) + "\n" + row[0][0], row[0][1])
    return list(rows.values())


if __name__ == "__main__":
    run_main(lambda: launch(main, needs_config=False))
