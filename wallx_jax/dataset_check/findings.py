"""Turn the statistics of a dataset into findings about training on it, each with a remedy.

Legend: N frames, D robot dims.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.dataset_check import videos
from wallx_jax.dataset_check.frames import FrameScan, Undecodable
from wallx_jax.dataset_check.signals import Jump, LagStats, Spread

ERROR, WARNING, OK = SEVERITIES = ("error", "warning", "ok")
CLAMPED, MOSTLY_CLAMPED = 0.05, 0.5  # fractions of values outside given statistics: warning, error
UNUSED_RANGE = 0.05  # q01 to q99 should span at least this fraction of the range of given statistics
COPIED = 0.99  # the action counts as a copy of the state if they are equal in at least this fraction of frames
LATE_S = 0.5  # seconds within which a robot should respond to a command
TOLERANCE_S = 1e-4  # lerobot's tolerance when it looks up a frame by its timestamp
OTHER_STATS = "unset norm_stats_path, or check that units and order of dims are the same"
CONTROL = re.compile(r"<\|[^|<>]*\|>|</?tool_call>")  # what Qwen's tokenizer does not treat as plain text


@dataclass(frozen=True)
class Finding:
    """A finding about a dataset.

    Attributes:
        severity: "error" (training fails or learns nonsense), "warning" or "ok".
        about: subject of the finding, e.g. "state" or a camera key.
        message: the finding.
        remedy: what to do, as a clause; empty if ok.
        stops_training: whether a run would end with an error.
    """

    severity: str
    about: str
    message: str
    remedy: str = ""
    stops_training: bool = False

    def __str__(self) -> str:
        return f"{self.severity:7}  {self.about}: {self.message}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, eq=False)
class Vector:
    """A dataset's state or action.

    Attributes:
        what: "state" or "action".
        key: its key in the dataset.
        names: names of its dims.
        used: bool [D], dims that are observed or predicted.
        needed: bool [D], dims that must have a value: those used and, for the state, those that actions are relative
            to.
        values: [N, D] as recorded.
        spread: distribution of the values.
        jumps: outlier steps.
        given: whether the spread is measured against given statistics.
    """

    what: str
    key: str
    names: list[str]
    used: np.ndarray
    needed: np.ndarray
    values: np.ndarray
    spread: Spread
    jumps: list[Jump]
    given: bool


def of_lengths(info: DatasetInfo, horizon: int) -> Iterator[Finding]:
    """Judge the lengths of the episodes against the action horizon, in frames."""
    if (longest := int(info.episode_lengths.max())) < horizon:
        text = f"all {info.num_episodes} are shorter than the horizon of {horizon} frames, the longest has {longest}"
        remedy = f"lower action_horizon to at most {longest}: every chunk ends in repetitions of the last action"
        yield Finding(WARNING, "episodes", text, remedy)
    elif short := int((info.episode_lengths < horizon).sum()):
        text = f"{short} of {info.num_episodes} are shorter than the horizon of {horizon} frames"
        yield Finding(WARNING, "episodes", text, "lower action_horizon: past the end a chunk repeats the last action")
    else:
        yield Finding(OK, "episodes", f"all are as long as the horizon of {horizon} frames, or longer")


def of_vector(vector: Vector, info: DatasetInfo) -> Iterator[Finding]:
    """Judge the values of the state or the action: missing, constant, jumping, or outside given statistics."""
    what, spread, values, used = vector.what, vector.spread, vector.values, vector.used
    moving = used & ~spread.constant
    missing = vector.needed & (spread.nans > 0)
    found = []

    def note(severity: str, message: str, remedy: str, stops_training: bool = False) -> None:
        found.append(Finding(severity, what, message, remedy, stops_training))

    def names(dims: np.ndarray) -> str:
        return _listed(vector.names, dims)

    def first(bad: np.ndarray) -> str:
        return f"the first at {info.describe(int(np.flatnonzero(bad.any(axis=1))[0]))}"

    repair = "repair these frames, or leave their episodes out with the setting `episodes`"
    if (infinite := spread.infinities > 0).any():
        text = f"infinite values in {names(infinite)}, {first(np.isinf(values))}"
        note(ERROR, text, f"{repair}: no statistics can be computed", stops_training=True)
    if missing.any():
        count, where = int(spread.nans[missing].sum()), first(np.isnan(values) & missing)
        text = f"NaN in {count} values of {names(missing)}, {where}"
        if what == "state":
            note(ERROR, text, f"{repair}: training stops at them", stops_training=True)
        else:
            note(WARNING, text, "repair them if they are not meant: such actions are left out of the loss")
    if used.any() and not moving.any():
        note(ERROR, "no dim ever changes", f"record the {what}s anew, or name the right {what}_key")
    elif (still := used & ~moving).any():
        note(WARNING, f"constant: {names(still)}", "fine for joints that rest, else a sensor is dead")
    if (stuck := used & spread.stuck).any():
        text = f"at one value in nearly all frames, so that q01 equals q99: {names(stuck)}"
        note(WARNING, text, "fine for a rare event, else leave these dims out: their range is taken as 1")
    if vector.jumps:
        note(WARNING, _jump_text(vector), "see trace.png; unwrap angles, repair glitches or cut the episodes")
    if vector.given:
        mostly = used & (spread.outside > MOSTLY_CLAMPED)
        some = used & (spread.outside > CLAMPED) & ~mostly
        shares = np.array([f"{name} {share:.0%}" for name, share in zip(vector.names, spread.outside, strict=True)])
        for severity, dims in ((ERROR, mostly), (WARNING, some)):
            if dims.any():
                text = f"outside the q01..q99 of norm_stats_path, and so clamped: {_listed(shares, dims)}"
                note(severity, text, OTHER_STATS)
        narrow = moving & ~spread.stuck & (spread.q99 - spread.q01 < UNUSED_RANGE * (spread.high - spread.low))
        if narrow.any():
            text = f"moves in under {UNUSED_RANGE:.0%} of the range of norm_stats_path: {names(narrow)}"
            note(WARNING, text, OTHER_STATS)
    yield from found or [Finding(OK, what, f"{len(used)} dims, all finite and moving, none jumps")]


def _jump_text(vector: Vector) -> str:
    largest: dict[int, Jump] = {}
    for jump in vector.jumps:  # the largest jump of a dim comes first
        largest.setdefault(jump.dim, jump)
    shown = [
        f"{vector.names[j.dim]} by {j.step:.4g} at episode {j.episode}, frame {j.frame} (usual steps: {j.typical:.2g})"
        for j in largest.values()
    ]
    return f"{len(vector.jumps)} jumps, the largest of each dim: {_listed(shown)}"


def of_following(
    info: DatasetInfo, state: Vector, action: Vector, pairs: Sequence[tuple[int, int]], following: LagStats
) -> Iterator[Finding]:
    """Judge how the state follows the action; `pairs`: (state dim, action dim) of each entry of `following`."""
    about = "action to state"
    names = [action.names[dim] for _, dim in pairs]
    used = np.array([state.used[s] and action.used[a] for s, a in pairs], bool)
    related, copied = following.related & used, (following.holds >= COPIED) & used
    if copied.any():
        text = f"the action is a copy of the same frame's state: {_listed(names, copied)}"
        yield Finding(WARNING, about, text, "take the command, or the next state: a copy says to hold still")
    if not related.any():
        yield Finding(OK, about, "no dim of the state moves as one of the action does (velocities, deltas?)")
        return
    lag = float(np.median(following.lag[related]))
    seconds = f"median {lag:g} frames, {lag / info.fps:.2f} s"
    if lag < 0:
        text = f"the state moves before the action does ({seconds})"
        yield Finding(WARNING, about, text, "check how they were put together: actions are commands, not measurements")
    elif lag / info.fps > LATE_S:
        text = f"the state follows the action late ({seconds})"
        yield Finding(WARNING, about, text, "check that the clocks of both agree, or shift the actions")
    elif not copied.any():
        leads = following.leads[related] >= COPIED
        exact = "; it is exactly the next state" if leads.all() else ""
        yield Finding(OK, about, f"the state follows the action ({seconds}){exact}")


def of_times(info: DatasetInfo, cameras: Sequence[str], times: np.ndarray) -> Iterator[Finding]:
    """Judge the timestamps; `times`: float64 [N], seconds since the start of the episode, as recorded."""
    frame = info.locate(np.arange(info.num_frames))[1]
    slack = TOLERANCE_S + np.finfo(np.float32).eps * abs(times)
    if not (off := ~(abs(times - frame / info.fps) <= slack)).any():  # negated <=, so that NaN counts as off
        yield Finding(OK, "timestamps", f"regular, {info.fps:g} per second")
        return
    place = np.flatnonzero(off)[0]
    text = (
        f"{int(off.sum())} of {len(off)} are not frame / {info.fps:g}, the first is {info.describe(place)}: "
        f"{times[place]:.4f} s"
    )
    remedy = "write frame / fps, or resample the recording to a steady rate"
    if any(map(info.is_video, cameras)):
        remedy = "write frame / fps: within half a frame they are understood here, but not by lerobot"
    yield Finding(WARNING, "timestamps", text, remedy)


def of_tasks(info: DatasetInfo, frames: Sequence[int]) -> Iterator[Finding]:
    """Judge the instructions; `frames`: number of frames per instruction."""
    used: dict[str, int] = {}
    for text, count in zip(info.tasks.values(), frames, strict=True):
        if count:
            used[text] = used.get(text, 0) + count
    spellings: dict[str, list[str]] = {}
    for text in used:
        spellings.setdefault(" ".join(text.split()).casefold(), []).append(text)
    found = []

    def note(severity: str, message: str, remedy: str) -> None:
        found.append(Finding(severity, "instructions", message, remedy, stops_training=severity == ERROR))

    if empty := sum(count for text, count in used.items() if not text.strip()):
        note(ERROR, f"empty for {empty} frames", "write an instruction: training stops at these")
    if control := [repr(text) for text in used if CONTROL.search(text)]:
        note(ERROR, f"control tokens in {_listed(control)}", "remove them from the text: training stops at these")
    if alike := [" and ".join(map(repr, texts)) for texts in spellings.values() if len(texts) > 1]:
        note(WARNING, f"the same but for case or spaces: {_listed(alike)}", "write them in one way")
    yield from found or [Finding(OK, "instructions", f"{len(used)} different")]


def of_videos(source: LeRobotSource, only_present: bool = False) -> Iterator[Finding]:
    """Judge the video files; `only_present`: as in `videos.problems`."""
    for problem in videos.problems(source, only_present):
        severity = ERROR if problem.certain else WARNING
        yield Finding(severity, problem.camera, problem.message, problem.remedy, stops_training=problem.certain)


def of_frames(info: DatasetInfo, look: FrameScan) -> Iterator[Finding]:
    """Judge the decoded frames: unreadable, black or frozen."""
    by_camera: dict[str, list[Undecodable]] = {}
    for image in look.undecodable:
        by_camera.setdefault(image.camera, []).append(image)
    for camera, lost in by_camera.items():
        first = f"the first is episode {lost[0].episode}, frame {lost[0].frame}: {lost[0].reason}"
        text = f"{len(lost)} of {look.frames} frames cannot be read, {first}"
        yield Finding(ERROR, camera, text, "copy the file again, or cut the episodes; report.json lists all")
    for camera, seen in look.cameras.items():
        if seen.dark:
            text = f"black in {seen.dark} of {seen.frames} frames"
            yield Finding(WARNING, camera, text, "see contact_sheet.png: a cap, or a camera that was off")
        if seen.frozen and seen.dark < seen.frames:
            which = _listed(map(str, seen.frozen))
            text = f"the same picture all through {len(seen.frozen)} of the episodes looked at: {which}"
            yield Finding(WARNING, camera, text, "see contact_sheet.png: if the camera hung, cut these episodes")
    if look.frames and not look.undecodable:
        yield Finding(OK, "frames", f"{look.frames} of {info.num_frames} were decoded, of every camera")


def _listed(items: Iterable[str], chosen: np.ndarray | None = None, most: int = 8) -> str:
    """Join items with commas, only those `chosen` (bool) if given, and at most the first `most`."""
    items = [item for i, item in enumerate(items) if chosen is None or chosen[i]]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
