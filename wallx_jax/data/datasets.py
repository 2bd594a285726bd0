"""Opens the datasets of a run, each with its own cameras, keys and statistics, and unifies their sample shapes.

The first dataset is described by the run's top-level settings; the setting `datasets` names the others.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wallx_jax.config.schema import RunConfig
from wallx_jax.data.fetch import fetch
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo, read_info
from wallx_jax.data.processor import Processor
from wallx_jax.data.validate import check_dataset
from wallx_jax.utils.errors import ConfigError


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of a run.

    Attributes:
        name: its name in the run.
        weight: sampling ratio relative to the first dataset.
        settings: the run's settings as if this were the only dataset, completed by check_dataset.
        source: all of its frames.
    """

    name: str
    weight: float
    settings: RunConfig
    source: LeRobotSource

    @property
    def info(self) -> DatasetInfo:
        return self.source.info


def open_datasets(run: RunConfig, videos: Literal["all", "first", "none"] = "all") -> tuple[DatasetSpec, ...]:
    """Open the datasets of a run.

    Reads the metadata, checks each dataset against its settings, fetches missing files from the hub, and checks the
    tables.

    Args:
        run: the configuration.
        videos: which videos to fetch: all, for each camera only the one with the first episode, or none. With
            download_videos=False none are fetched.

    Raises:
        ConfigError: settings do not fit a dataset; lists all of them, prefixed by the name of each dataset after the
            first.
        FileNotFoundError: a file is missing.
        DatasetError: a dataset is damaged or contradicts itself.
    """
    found, errors, offers = [], [], []
    for number, (name, weight, settings) in enumerate(run.datasets()):
        data, with_name = settings.data, f"datasets.{name}: " if number else ""
        info = read_info(data.location, data.revision, data.episodes)
        try:
            found.append((name, weight, check_dataset(settings, info), info))
        except ConfigError as error:
            errors += [with_name + text for text in error.errors]
            offers.append(error.offer)
    if errors:
        raise ConfigError(*errors, offer="\n".join(dict.fromkeys(offers)))
    return tuple(
        DatasetSpec(name, weight, settings, _open(settings, info, videos)) for name, weight, settings, info in found
    )


def _open(settings: RunConfig, info: DatasetInfo, videos: str) -> LeRobotSource:
    data = settings.data
    cameras = [camera.key for camera in data.cameras]
    fetched = cameras if videos != "none" and data.download_videos else []
    fetch(info, fetched, first_only=videos == "first")
    return LeRobotSource(info, data.action_horizon, cameras, data.state_key, data.action_key)


def unify_prompt_length(specs: Sequence[DatasetSpec], processors: Sequence[Processor]) -> tuple[Processor, ...]:
    """Return the processors with the longest of their prompt lengths, so that one compiled step serves all datasets.

    Raises:
        ConfigError: datasets differ in the number or sizes of their images; lists them.
    """
    sizes = [processor.config.image_sizes for processor in processors]
    errors = [
        f"datasets.{spec.name}: its images come to {_text(size)} (height x width), those of {specs[0].name} to "
        f"{_text(sizes[0])}; set camera_views and resolution so that both have the same number and sizes"
        for spec, size in zip(specs, sizes, strict=True)
        if size != sizes[0]
    ]
    if errors:
        raise ConfigError(*errors)
    length = max(processor.config.prompt_length for processor in processors)
    return tuple(
        Processor(dataclasses.replace(p.config, prompt_length=length), p.tokenizer, p.stats, p.fast) for p in processors
    )


def _text(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sizes)
