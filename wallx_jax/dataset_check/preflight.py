"""Check settings and datasets before weights are loaded, for what would stop a run later or make no sense."""

from collections.abc import Sequence

from wallx_jax.config.schema import RunConfig
from wallx_jax.data.datasets import DatasetSpec
from wallx_jax.data.errors import DatasetError, FrameError
from wallx_jax.dataset_check import findings
from wallx_jax.dataset_check.check import check_tables
from wallx_jax.dataset_check.findings import ERROR, OK, WARNING, Finding
from wallx_jax.utils.errors import ConfigError
from wallx_jax.utils.files import unusable_folder


def check_folders(run: RunConfig) -> None:
    """Check that a run's output folders are writable.

    Raises:
        ConfigError: naming every setting with an unusable folder, and the reason.
    """
    folders = {"save_path": run.loop.save_path, "frame_cache": run.data.frame_cache}
    if run.loop.profile:
        folders["profile_save_path"] = run.loop.profile_save_path
    found = {key: unusable_folder(path) for key, path in folders.items() if path is not None}
    errors = [f"{key} = {folders[key]!r}: {why}; choose another folder" for key, why in found.items() if why]
    if errors:
        raise ConfigError(*errors)


def check_length(run: RunConfig, frames: int, global_batch: int, total_steps: int) -> list[tuple[str, Finding]]:
    """Check the length of a run for settings that are probably unintended.

    Args:
        run: the settings.
        frames: number of training frames over all datasets.
        global_batch: samples per update.
        total_steps: number of updates.

    Returns:
        ("settings", finding) for each finding.
    """
    found = []
    if run.optim.warmup_steps >= total_steps:
        text = f"{run.optim.warmup_steps:,} updates of warm-up in a run of {total_steps:,}: the peak is never reached"
        found.append(Finding(WARNING, "num_warmup_steps", text, "lower it, or train longer"))
    if global_batch > frames:
        text = f"an update has {global_batch:,} samples, more than there are training frames, {frames:,}"
        remedy = "lower batch_size_per_gpu or gradient_accumulation_steps"
        found.append(Finding(WARNING, "batch_size_per_gpu", text, remedy))
    return [("settings", finding) for finding in found]


def check(parts: Sequence[DatasetSpec]) -> list[tuple[str, Finding]]:
    """Check the tables of a run's datasets, the headers of their videos, and the first frame of each camera.

    Videos that are not fetched yet are skipped. With unreadable_frames="skip", problems of videos and frames do not
    stop training.

    Returns:
        (dataset, finding) for each finding that does not stop training but deserves attention.

    Raises:
        DatasetError: listing everything that stops training, each with its remedy.
    """
    noted = []
    for part in parts:
        videos = list(findings.of_videos(part.source, only_present=part.info.commit is not None))
        frames = _first_frames(part)
        found = [*check_tables(part).findings, *videos, *frames]
        skipped = [*videos, *frames] if part.settings.data.unreadable_frames == "skip" else []
        if fatal := [finding for finding in found if finding.stops_training and finding not in skipped]:
            lines = [f"  - {finding.about}: {finding.message}; {finding.remedy}" for finding in fatal]
            raise DatasetError("\n".join([f"{part.settings.data.location} cannot be trained on:", *lines]))
        noted += [(part.name, finding) for finding in found if finding.severity != OK]
    return noted


def _first_frames(part: DatasetSpec) -> list[Finding]:
    """Decode the first frame of each camera; return a finding for each that cannot be read."""
    images, unreadable = part.source.images, []
    for camera in part.source.cameras:
        if part.info.commit is not None and not images.file_of(camera, 0).is_file():
            continue
        try:
            images.read(camera, 0)
        except FrameError as error:
            remedy = "scripts/check_dataset.py looks at the others"
            unreadable.append(Finding(ERROR, camera, str(error), remedy, stops_training=True))
    return unreadable
