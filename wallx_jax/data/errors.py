"""Define the errors raised for faulty datasets."""

from pathlib import Path

from wallx_jax.utils.errors import UserError

REWRITE = "rewrite the dataset"


class DatasetError(UserError, ValueError):
    """Raised if a dataset is incomplete, damaged or contradicts itself. The message names file, column and rows."""


class FrameError(DatasetError):
    """Raised if a frame cannot be read or decoded. The message names dataset, episode, frame and file."""


def unreadable(camera: str, file: Path, dataset: str, frame: str, error: Exception) -> FrameError:
    """Build the error for an image that cannot be read from `file`; `frame` comes from `DatasetInfo.describe`."""
    reason = " ".join(str(error).replace(str(file), "it").split())[:300]
    return FrameError(
        f"{dataset}: {frame}: {camera} cannot be read from {file} ({type(error).__name__}: {reason}); copy the file "
        "again, or exclude the episode with the setting `episodes`"
    )
