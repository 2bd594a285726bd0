"""What is wrong with a dataset."""

from pathlib import Path

REWRITE = "write the dataset again"


class DatasetError(ValueError):
    """A dataset is incomplete, damaged or contradicts itself. The message names file, column and rows."""


class FrameError(DatasetError):
    """A frame cannot be read or decoded. The message names dataset, episode, frame and file."""


def unreadable(camera: str, file: Path, dataset: str, frame: str, error: Exception) -> FrameError:
    """The error for a frame whose image cannot be read from `file`; `frame` as `DatasetInfo.describe` names it."""
    reason = " ".join(str(error).replace(str(file), "it").split())[:300]
    return FrameError(
        f"{dataset}: {frame}: {camera} cannot be read from {file} ({type(error).__name__}: {reason}); copy the file "
        "again, or leave the episode out with the setting `episodes`"
    )
