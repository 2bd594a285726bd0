"""Compute exact normalization statistics of a LeRobot dataset, from its table files only, without reading any video.

    python scripts/compute_norm_stats.py --dataset DIR_OR_REPO [--state_key KEY] [--action_key KEY] [--output OUT]
    python scripts/compute_norm_stats.py --config=configs/aloha.py [--config.key=value ...] [--output OUT]

--config: statistics of the state and actions that a run with these settings trains on, the same as it would compute
itself. Prints a table and writes norm_stats.json in upstream's format, for `norm_stats_path`: to OUT if that ends in
.json, otherwise into the directory OUT; with several datasets, into OUT/NAME for each.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

from wallx_jax.config import resolve
from wallx_jax.config.command_line import CommandLineError, launch
from wallx_jax.config.robots import KEY_MAPPINGS
from wallx_jax.data.build import dataset_stats
from wallx_jax.data.datasets import open_datasets
from wallx_jax.data.metadata import DatasetInfo, read_info
from wallx_jax.data.normalize import FILE_NAME, NormStats, save_norm_stats
from wallx_jax.data.stats import compute_stats, table
from wallx_jax.utils.errors import run_main

# Scripts may define a flag of the same name and be imported into one program.
define = functools.partial(flags.DEFINE_string, allow_override=True)
define("dataset", None, "LeRobot dataset, directory or hub repo id, in place of --config.")
define("state_key", None, "With --dataset: the state, 'FEATURE' or 'FEATURE[START:STOP],FEATURE,...'.")
define("action_key", None, "With --dataset: the action, likewise.")
define("output", FILE_NAME, "File to write, *.json, or a directory.")


def main(config: ConfigDict | None) -> None:
    for file, info, stats in of_config(config) if flags.FLAGS.dataset is None else of_dataset(config):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_norm_stats(file, stats)
        print(f"{table(stats, info)}\nwrote {file}")


def of_dataset(config: ConfigDict | None) -> Iterator[tuple[Path, DatasetInfo, NormStats]]:
    """Yield the output file, metadata and statistics of --dataset."""
    values = flags.FLAGS
    if config is not None:
        raise CommandLineError("--config and --dataset are mutually exclusive: give one of them")
    _, state_key, action_key = KEY_MAPPINGS.get(values.dataset, ({}, "observation.state", "action"))
    info = read_info(values.dataset)
    keys = (values.state_key or state_key, values.action_key or action_key)
    yield output(), info, compute_stats(info, *keys, progress=True)


def of_config(config: ConfigDict | None) -> Iterator[tuple[Path, DatasetInfo, NormStats]]:
    """Yield the output file, metadata and statistics of each dataset of a run."""
    values = flags.FLAGS
    if config is None:
        raise CommandLineError("of what? Give --dataset DIR_OR_REPO or --config=configs/NAME.py")
    if values.state_key or values.action_key:
        raise CommandLineError("--state_key and --action_key go with --dataset; write --config.state_key=... instead")
    run = resolve(config)
    parts = open_datasets(run, videos="none")
    for part in parts:
        file = output() if len(parts) == 1 else output(part.name)
        yield file, part.info, dataset_stats(part.settings, part.source, progress=True)


def output(name: str = "") -> Path:
    """Return the file to write statistics to; `name`: the dataset, if there are several."""
    out = Path(flags.FLAGS.output)
    if out.suffix != ".json":
        return out / name / FILE_NAME
    if name:
        raise CommandLineError(f"--output {out}: the settings have several datasets; give a directory")
    return out


if __name__ == "__main__":
    run_main(lambda: launch(main, needs_config=False))
