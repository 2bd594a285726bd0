"""Settings of the dataset: where it is, its cameras and prompt, the split, and how to read it."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from wallx_jax.config.prompt_template import VIEW_NAMES, PromptTemplate, template_errors
from wallx_jax.config.ranges import parse_ranges
from wallx_jax.config.robots import KEY_MAPPINGS
from wallx_jax.utils.errors import nearest
from wallx_jax.utils.settings import Choice, section, setting

VIEWS = ("face_view", "left_wrist_view", "right_wrist_view", "move1_view", "move2_view", "top_view", "wall_view")
SLIP = 0.85  # difflib similarity above which a name counts as misspelled: one or two wrong letters


class SplitMode(Choice):
    """What is held out for validation."""

    EPISODE = "episode"
    FRAME = "frame"


class UnreadableFrames(Choice):
    """What to do on a frame that cannot be decoded."""

    STOP = "stop"
    SKIP = "skip"


def _is_resolution(pixels: Any) -> bool:
    return isinstance(pixels, int) and not isinstance(pixels, bool) and (pixels == -1 or pixels >= 28)


@dataclass(frozen=True)
class Camera:
    """One camera of the robot.

    Attributes:
        view: name of the view, such as "face_view"; the prompt has its text in `PromptTemplate.view_names`.
        key: the camera's feature in the dataset.
        resolution: longer side of the resized image in pixels; -1 keeps the recorded size.
    """

    view: str
    key: str
    resolution: int


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Strengths of the random augmentations of training images, as in openpi (data.augment)."""

    enabled: ClassVar[bool] = setting(False, "True: augment every training sample", derived=True)
    crop: float = setting(
        0.95,
        "side of the random crop as a fraction of the image, resized back to full size; 1: no crop",
        above=0,
        maximum=1,
    )
    rotate_deg: float = setting(5.0, "maximum rotation in either direction, degrees", minimum=0, maximum=180)
    brightness: float = setting(0.3, "x: factor drawn from [1 - x, 1 + x]; 0: off", minimum=0, maximum=1)
    contrast: float = setting(0.4, "as brightness", minimum=0, maximum=1)
    saturation: float = setting(0.5, "as brightness", minimum=0, maximum=1)
    wrist_geometry: bool = setting(False, "also crop and rotate wrist views, whose geometry encodes the hand's pose")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A dataset and how to read it.

    Attributes:
        cameras: in prompt order.
        state_key: feature slices of the state, see `wallx_jax.config.feature_slices`.
        action_key: feature slices of the action.
        action_horizon: A, future actions per sample.
        augment: None: no augmentation.
    """

    repo_id: str = setting(
        None, "LeRobot v3.0 dataset: Hub repo id or local directory", required=True, per_dataset=True
    )
    root: str | None = setting(
        None,
        "local directory to read instead; repo_id then only selects the key mapping",
        key="dataset_root",
        inherited=False,
    )
    revision: str | None = setting(
        None,
        "Hub branch, tag or commit; None: the newest v3.0 tag",
        key="dataset_revision",
        per_dataset=True,
        inherited=False,
    )
    download_videos: bool = setting(True, "also download video files")
    episodes: str | None = setting(
        None, 'episode_index ranges to use: "0:50,60" is 0 to 49, and 60; None: all', per_dataset=True, inherited=False
    )
    unreadable_frames: UnreadableFrames = setting(
        UnreadableFrames.STOP, 'on a frame that cannot be decoded: "stop" the run or "skip" to another frame'
    )
    cameras: tuple[Camera, ...] = setting(
        {},
        "{view: camera feature} in prompt order; empty: the known mapping for repo_id",
        key="camera_views",
        derived=True,
        entry=(lambda key: isinstance(key, str), "a camera key of the dataset"),
        per_dataset=True,
    )
    state_key: str = setting(
        None,
        "state feature, also its key in norm_stats.json; ignored if agent_pos_config has feature slices; None: the "
        'known mapping for repo_id, else "observation.state"',
        derived=True,
        per_dataset=True,
    )
    action_key: str = setting(
        None,
        "action feature, also its key in norm_stats.json; ignored if dof_config has feature slices; None: the known "
        'mapping for repo_id, else "action"',
        derived=True,
        per_dataset=True,
    )
    resolution: ClassVar[Mapping[str, int]] = setting(
        dict.fromkeys(VIEWS, 256),
        "{view: longer side in pixels}; -1: as recorded",
        derived=True,
        entry=(_is_resolution, "pixels, at least 28, or -1"),
        per_dataset=True,
    )
    prompt: PromptTemplate = section(PromptTemplate)
    norm_stats_path: str | None = setting(
        None, "norm_stats.json to use; None: computed from the dataset", per_dataset=True, inherited=False
    )
    train_test_split: float = setting(0.95, "fraction of the episodes to train on", above=0, maximum=1)
    split_mode: SplitMode = setting(
        SplitMode.EPISODE, 'hold out whole "episode"s, or random "frame"s of the trained episodes as upstream does'
    )
    split_seed: int = setting(42, 'for split_mode "frame"', minimum=0)
    action_horizon: int = setting(32, "actions per chunk, in frames, starting at the current frame", above=0)
    max_length: int = setting(768, "maximum tokens of prompt plus actions; a longer sample is an error", above=0)
    max_fast_tokens: int = setting(256, "tokens of max_length reserved for FAST actions", above=0)
    augment: AugmentConfig | None = section(AugmentConfig)
    frame_cache: str | None = setting(None, "cache directory for decoded, resized frames; None: decode every time")
    num_workers: int = setting(4, "data loading processes; 0: load in the training process", minimum=0)
    batch_size: int = setting(
        8, "samples per device and micro-batch", key="batch_size_per_gpu", above=0, after="num_warmup_steps"
    )
    eval_batch_size: int = setting(
        None,
        "validation samples per device; None: batch_size_per_gpu",
        key="eval_batch_size_per_gpu",
        derived=True,
        above=0,
        after="eval_batches",
    )

    @property
    def location(self) -> str:
        """Where to open the dataset: the local directory if given, else the repo id."""
        return self.root or self.repo_id

    @staticmethod
    def errors(v: Mapping[str, Any]) -> list[str]:
        """Check the section's settings, also against each other, given all settings by key."""
        errors = []
        if v["episodes"] is not None:
            try:
                parse_ranges(v["episodes"])
            except ValueError as error:
                errors.append(f"episodes = {v['episodes']!r}: {error}")
        texts = {key: v[f"prompt.{key}"] for key in ("system", "image", "action", "language")}
        words = {view: words for view, words in v["prompt.view_names"].items() if isinstance(words, str)}
        return [*errors, *template_errors(words, **texts), *_view_errors(v)]


def camera_views(v: Mapping[str, Any]) -> Mapping[str, str]:
    """Return {view: camera key} in prompt order, given all settings by key."""
    return v["camera_views"] or KEY_MAPPINGS.get(v["repo_id"], ({},))[0]


def _view_errors(v: Mapping[str, Any]) -> list[str]:
    """Check that each view has a resolution and one camera of its own, and is not a misspelled one."""
    errors, views = [], camera_views(v)
    known = list(dict.fromkeys([*VIEWS, *views]))
    for view, pixels in v["resolution"].items():
        if view not in known:
            hint = nearest(view, known)
            errors.append(f"resolution.{view} = {pixels!r}: no camera has this view{hint}; known are {known}")
    for view in views:
        if view not in VIEW_NAMES and view not in v["prompt.view_names"] and (meant := _nearest_view(view, SLIP)):
            errors.append(
                f'camera_views.{view}: did you mean "{meant}"? A view of your own needs its words in the prompt, '
                f"prompt.view_names.{view}, and its pixels, resolution.{view}"
            )
        elif view not in v["resolution"]:
            hint = f' (did you mean "{meant}"?)' if (meant := _nearest_view(view, 0.5)) else ""
            errors.append(f"resolution.{view}: missing; camera_views has this view{hint}, set its pixels, e.g. 256")
    if len(set(v["camera_views"].values())) < len(v["camera_views"]):
        errors.append(f"camera_views = {v['camera_views']}: one camera has two views; give each its own")
    return errors


def _nearest_view(view: str, cutoff: float) -> str | None:
    """Return the known view whose name or prompt text is closest: "face_view" for "front_view"."""
    names = {text: name for name, words in VIEW_NAMES.items() for text in (words, name)}
    close = difflib.get_close_matches(view, names, 1, cutoff)
    return names[close[0]] if close else None


def view_name_errors(*datasets: Mapping[str, Any]) -> list[str]:
    """Report prompt texts for views that no dataset has, given all settings of each dataset by key."""
    known = list(dict.fromkeys([*VIEW_NAMES, *(view for v in datasets for view in camera_views(v))]))
    return [
        f"prompt.view_names.{view} = {words!r}: no camera has this view{nearest(view, known)}; known are {known}"
        for view, words in datasets[0]["prompt.view_names"].items()
        if view not in known
    ]
