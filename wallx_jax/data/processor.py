"""Turn one observation into one model sample: the only preprocessing for training, evaluation and inference.

Legend: T prefix tokens, W label window, A action horizon, C model channels, D robot dims.
"""

import copy
import dataclasses
import functools
import itertools
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.data import images as image_ops
from wallx_jax.data import prompt
from wallx_jax.data.batch import Batch
from wallx_jax.data.fast import FastTokenizer
from wallx_jax.data.normalize import Normalizer, NormStats, load_norm_stats, save_norm_stats
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.utils.files import read_json_object, write_text

FILE_NAME = "processor.json"
ROBOTS = "robots"  # folder with one subfolder per robot of a run with several datasets
PROMPT_STEP = 32  # prompts longer than in training are padded to a multiple of this, so that few lengths are compiled


@dataclass(frozen=True)
class ProcessorConfig:
    """Layout of a sample: what determines its shapes and its text.

    Attributes:
        views: camera names used in the prompt ("face_view"), in prompt order; the next three fields follow the same
            order.
        camera_keys: the dataset's camera for each view.
        resolutions: target length of the longer side per view in pixels, before rounding to the grid; -1 keeps the size
            of the dataset's frames, to which images of other sizes are resized at inference.
        image_sizes: resulting (height, width) per view.
        horizon: A.
        prompt_length: T.
        label_window: W.
        state_dim: C of the state.
        action_dim: C of the actions.
        objective: "flow" for flow matching, or "fast" for actions as text.
        state_key: the dataset's state, also its name in norm_stats.json.
        action_key: the dataset's action, also its name in norm_stats.json.
        observed: one flag per state dim; a dim that is off is masked like one that the robot lacks. Empty: all on.
        predicted: one flag per action dim, likewise.
        prompt: text of the prompt.
        relative_to: state dim per action dim that it is relative to, or -1. The model's input and output are then the
            differences of the whole chunk from the state at its start. Empty: no dim is relative.
        state_names: the dataset's names for the state dims; a dim without a name gets its number. Empty: all numbers.
        action_names: the dataset's names for the action dims, likewise.

    Raises:
        ValueError: if the per-view fields differ in length, or the objective is unknown.
    """

    views: tuple[str, ...]
    camera_keys: tuple[str, ...]
    resolutions: tuple[int, ...]
    image_sizes: tuple[tuple[int, int], ...]
    horizon: int
    prompt_length: int
    label_window: int = 0
    state_dim: int = 20
    action_dim: int = 20
    objective: Literal["flow", "fast"] = "flow"
    state_key: str = "observation.state"
    action_key: str = "action"
    observed: tuple[bool, ...] = ()
    predicted: tuple[bool, ...] = ()
    prompt: PromptTemplate = PromptTemplate()
    relative_to: tuple[int, ...] = ()
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("views", "camera_keys", "resolutions", "image_sizes")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"expected one entry per camera in each, got {lengths}")
        if self.objective not in ("flow", "fast"):
            raise ValueError(f"objective is {self.objective!r}; choose 'flow' or 'fast'")

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Prompt tokens per image."""
        return tuple(image_ops.image_token_count(*size) for size in self.image_sizes)


class _Prompts:
    """Prompts without an answer, of which the latest few thousand are kept; another process gets none of them.

    A dataset repeats a few instructions, and tokenising dominates the cost of encoding.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.count = functools.lru_cache(maxsize=4096)(functools.partial(_count_tokens, tokenizer))
        self.fit = functools.lru_cache(maxsize=4096)(functools.partial(_fit_unanswered, tokenizer))

    def __reduce__(self) -> tuple[type, tuple[Tokenizer]]:
        return _Prompts, (self._tokenizer,)


def _count_tokens(tokenizer: Tokenizer, instruction: str, config: ProcessorConfig, task: prompt.Task) -> int:
    return len(_encode(tokenizer, instruction, config, task).ids)


def _fit_unanswered(
    tokenizer: Tokenizer, instruction: str, config: ProcessorConfig, task: prompt.Task
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    encoded = _encode(tokenizer, instruction, config, task)
    arrays = prompt.fit(encoded, config.prompt_length, config.label_window)
    for array in arrays:
        array.flags.writeable = False  # shared by all samples with this instruction
    return arrays


class Processor:
    """Encodes observations and decodes actions with a tokenizer, normalizers and a layout.

    A Processor remains usable after any error.

    Args:
        config: the layout.
        tokenizer: tokenizer with the Wall-X tokens added.
        stats: statistics of this robot.
        fast: the action tokenizer; only needed for objective "fast".

    Attributes:
        config: the layout.
        tokenizer: as given.
        stats: as given.
        fast: as given.
        state: normalizer of the state.
        action: normalizer of the actions.
        observed: bool [D], state dims that the policy observes.
        predicted: bool [D], action dims that the policy predicts.
        relative: bool [D], action dims that are relative to the state.
        given: bool [D], action dims that decoding returns, D' of them. These are the predicted dims, and those
            unpredicted (hence untrained) dims that hold the state, because they are relative to one of its dims or
            share its name.
        names: str [D'], names of the dims that decoding returns.

    Raises:
        ValueError: if the robot is wider than the model, the statistics were computed from other differences of actions
            and state, or the action tokenizer is missing or does not match the vocabulary.
    """

    def __init__(
        self, config: ProcessorConfig, tokenizer: Tokenizer, stats: NormStats, fast: FastTokenizer | None = None
    ):
        if config.objective == "fast":
            if fast is None:
                raise ValueError("objective 'fast' needs an action tokenizer: set action_tokenizer_path")
            if tokenizer.fast_start is None or tokenizer.fast_size < fast.vocab_size:
                have = 0 if tokenizer.fast_start is None else tokenizer.fast_size
                raise ValueError(
                    f"the action tokenizer has {fast.vocab_size} tokens, but the vocabulary has {have} "
                    "<|action_token_i|>; add them first"
                )
        self.config, self.tokenizer, self.stats, self.fast = config, tokenizer, stats, fast
        self._prompts = _Prompts(tokenizer)
        self.state = Normalizer(stats.state, config.state_dim)
        self.action = Normalizer(stats.action, config.action_dim)
        self.observed = _flags("observed", config.observed, self.state.dims)
        self.predicted = _flags("predicted", config.predicted, self.action.dims)
        self._state_mask = self.state.pad(self.observed)
        self._action_mask = self.action.pad(self.predicted)
        stats.check_relative(config.relative_to, config.horizon)
        relative_to = np.array(config.relative_to or (-1,) * self.action.dims)
        if len(relative_to) != self.action.dims or relative_to.max() >= self.state.dims:
            raise ValueError(
                f"relative_to is {config.relative_to}; expected for each of {self.action.dims} action dims -1 or one "
                f"of {self.state.dims} state dims"
            )
        self.relative = relative_to >= 0
        self._reference = relative_to[self.relative]
        names = _names("action_names", config.action_names, self.action.dims)
        state_names = _names("state_names", config.state_names, self.state.dims)
        same = np.where(self.relative, relative_to, [_place(name, state_names) for name in names])
        self._holds = ~self.predicted & (same >= 0)
        self._held = same[self._holds]
        self.given = self.predicted | self._holds
        self.names = tuple(itertools.compress(names, self.given))
        self._needed = self.observed.copy()  # dims of the state that must have a value
        self._needed[self._reference] = True
        self._needed_to_act = self._needed.copy()
        self._needed_to_act[self._held] = True

    def encode(
        self,
        images: Sequence[Any],
        state: Any,
        instruction: str,
        actions: Any | None = None,
        action_is_pad: Any | None = None,
        resized: bool = False,
        task: prompt.Task = "action",
    ) -> Batch:
        """Encode one observation, in training with the actions that followed, as one sample without batch axis.

        Args:
            images: uint8 RGB [H, W, 3] or PIL, one per view in the configured order.
            state: [D] in robot units.
            instruction: what the robot should do.
            actions: [A, D] in robot units; None at inference. Non-finite values count as missing and are masked per
                channel.
            action_is_pad: bool [A], steps past the episode's end.
            resized: whether the images have been resized by `data.images.resize` already.
            task: "action", or "language" to ask for the next subtask as text instead of actions.

        Raises:
            ValueError: naming the field, its value and what was expected; also if the prompt does not fit.
        """
        config = self.config
        _check_instruction(instruction)
        pixels = self._images(images, resized, inference=actions is None)
        state = as_numbers("state", state)
        if state.shape != (self.state.dims,):
            raise ValueError(f"state has shape {state.shape}; expected {(self.state.dims,)}")
        needed = self._needed_to_act if actions is None else self._needed
        if (missing := ~np.isfinite(state) & needed).any():
            raise ValueError(f"state is not finite at dims {np.flatnonzero(missing).tolist()}")

        mask = np.tile(self._action_mask, (config.horizon, 1))
        values, is_pad = np.zeros_like(mask), np.zeros(config.horizon, bool)
        if actions is not None:
            actions, expected = as_numbers("actions", actions), (config.horizon, self.action.dims)
            if actions.shape != expected:
                raise ValueError(f"actions have shape {actions.shape}; expected {expected} (horizon, dims)")
            mask *= self.action.pad(np.isfinite(actions))
            values = self.action.normalize(actions - self.reference(state)) * mask
            if action_is_pad is not None:
                is_pad = np.asarray(action_is_pad, bool)
        tokens, token_mask, labels = self._text(instruction, None if actions is None else values, task)
        state_mask = self._state_mask.copy()
        state = self.state.normalize(state) * state_mask
        return Batch(pixels, tokens, token_mask, labels, state, state_mask, values, mask, is_pad)

    def for_inference(self, images: Sequence[Any], instruction: str, task: prompt.Task = "action") -> "Processor":
        """Return a Processor with the same preprocessing whose layout fits these images and this instruction.

        Training fixes image sizes and prompt length, but a robot's cameras or an operator's instruction may differ. The
        same rules then yield other image sizes, and the prompt length grows as needed, to a multiple of PROMPT_STEP
        tokens. Padding does not change the result. No positions are reserved for an answer. A view without a sizing
        rule (resolution -1) keeps its size from training.

        Args:
            images: as for `encode`.
            instruction: as for `encode`.
            task: as for `encode`.

        Raises:
            ValueError: as `encode`.
        """
        config = self.config
        _check_instruction(instruction)
        self._check_count(images)
        sizes = tuple(
            size if resolution == -1 else image_ops.target_size(*image_ops.size_of(image, view), resolution, view)
            for view, image, resolution, size in zip(
                config.views, images, config.resolutions, config.image_sizes, strict=True
            )
        )
        trained = config.prompt_length - config.label_window
        layout = dataclasses.replace(config, image_sizes=sizes, label_window=0)
        needed = self._prompts.count(instruction, layout, task)
        length = trained if needed <= trained else -(-needed // PROMPT_STEP) * PROMPT_STEP
        other = copy.copy(self)
        other.config = dataclasses.replace(layout, prompt_length=length)
        return other

    def _check_count(self, images: Sequence[Any]) -> None:
        if len(images) != len(views := self.config.views):
            raise ValueError(f"got {len(images)} images; expected {len(views)}, in order {list(views)}")

    def _images(self, images: Sequence[Any], resized: bool, inference: bool) -> tuple[np.ndarray, ...]:
        config = self.config
        self._check_count(images)
        resolutions = (None,) * len(images) if resized else config.resolutions
        layout = zip(config.views, images, resolutions, config.image_sizes, strict=True)
        return tuple(
            image_ops.resize_to(image, size, view)
            if inference and resolution == -1
            else _image(view, image, resolution, size)
            for view, image, resolution, size in layout
        )

    def _text(
        self, instruction: str, actions: np.ndarray | None, task: prompt.Task
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens [T], mask [T] and labels [W]; `actions` is normalized [A, C], or None at inference."""
        if self.config.objective == "flow" or actions is None:
            return self._prompts.fit(instruction, self.config, task)
        config = self.config
        # Without padding and masked dims, whose zeros would change the tokens.
        if self.fast is None:
            raise ValueError('this processor has no FAST tokenizer, which the objective "fast" encodes actions with')
        answer = self.fast.encode(actions[:, : self.action.dims][:, self.predicted])
        encoded = _encode(self.tokenizer, instruction, config, answer=answer)
        return prompt.fit(encoded, config.prompt_length, config.label_window)

    def reference(self, state: Any) -> np.ndarray:
        """Return the offset that is subtracted from actions before normalization and added back when decoding.

        It is the state where an action is relative to it, else 0.

        Args:
            state: [..., D of the state] in robot units.

        Returns:
            float64 [..., D of the action] in robot units.
        """
        state = np.asarray(state, np.float64)
        taken_off = np.zeros((*state.shape[:-1], self.action.dims))
        taken_off[..., self.relative] = state[..., self._reference]
        return taken_off

    def decode_actions(self, chunk: Any, state: Any | None = None) -> np.ndarray:
        """Decode model units [..., A, C] to float32 robot units [..., A, D'] of the dims in `given`.

        Args:
            chunk: [..., A, C] in model units.
            state: [..., D] in robot units, as passed to `encode`; required if actions are relative to it or hold it.

        Raises:
            ValueError: if the state is required but missing, or the chunk has another width.
        """
        actions = self.action.unnormalize(chunk)
        if self.relative.any() or self._holds.any():
            if state is None:
                raise ValueError("some actions are relative to the state or hold it: pass the state to decode them")
            state = np.asarray(state, np.float64)[..., None, :]
            with np.errstate(over="ignore"):
                actions = (actions + self.reference(state)).astype(np.float32)
                actions[..., self._holds] = state[..., self._held]
        return actions[..., self.given]

    def decode_action_tokens(self, ids: Iterable[int], state: Any | None = None) -> np.ndarray:
        """Decode vocabulary ids of `<|action_token_i|>` to float32 robot units [A, D'].

        Args:
            ids: ids of one chunk.
            state: as for `decode_actions`.

        Raises:
            ValueError: for an id that is not an action token, or as `decode_actions`.
            FastDecodeError: if the tokens do not form a chunk.
        """
        if self.fast is None or self.tokenizer.fast_start is None:
            raise ValueError("this checkpoint has no action tokenizer; it was trained with objective 'flow'")
        start, size = self.tokenizer.fast_start, self.fast.vocab_size
        tokens = [int(i) - start for i in ids]
        if strangers := [t + start for t in tokens if not 0 <= t < size]:
            raise ValueError(f"ids {strangers} are not action tokens; action tokens are {start}..{start + size - 1}")
        chunk = np.zeros((self.config.horizon, self.action.dims), np.float32)
        chunk[:, self.predicted] = self.fast.decode(tokens, self.config.horizon, int(self.predicted.sum()))
        return self.decode_actions(chunk, state)

    def save(self, directory: str | Path) -> None:
        """Write everything that `from_dir` needs: tokenizer files, norm_stats.json, processor.json and fast/."""
        directory = Path(directory)
        self._save_robot(directory)
        self.tokenizer.save(directory)
        if self.fast is not None:
            self.fast.save(directory / "fast")

    def save_as(self, directory: str | Path, robot: str) -> None:
        """Add this robot to a directory with the same tokenizers: write its robot-specific files to robots/NAME/."""
        self._save_robot(Path(directory) / ROBOTS / robot)

    def _save_robot(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_norm_stats(directory, self.stats)
        write_text(directory / FILE_NAME, json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_dir(cls, directory: str | Path, robot: str | None = None) -> "Processor":
        """Load a processor written by `save`, or with `robot` one written by `save_as`.

        Raises:
            FileNotFoundError: naming the missing file.
            ValueError: if processor.json has unknown fields or lacks required ones.
        """
        own = Path(directory) if robot is None else Path(directory) / ROBOTS / robot
        config = read_config(own)
        stats = load_norm_stats(own, config.state_key, config.action_key)
        fast = FastTokenizer.from_dir(Path(directory) / "fast") if (Path(directory) / "fast").is_dir() else None
        return cls(config, Tokenizer.from_dir(directory), stats, fast)


def read_config(directory: str | Path) -> ProcessorConfig:
    """Read the layout from a directory's processor.json.

    Fields missing from the file did not exist when it was written and take their defaults.

    Raises:
        FileNotFoundError: if there is no processor.json.
        ValueError: as `Processor.from_dir`.
    """
    file = Path(directory) / FILE_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; expected the processor folder of a checkpoint")
    fields = read_json_object(file)
    _check_fields(file, fields, ProcessorConfig)
    if "prompt" in fields:
        _check_fields(file, fields["prompt"], PromptTemplate, "prompt: ")
        fields["prompt"] = PromptTemplate(**fields["prompt"])
    values: dict[str, Any] = {k: tuple(map(_tuples, v)) if isinstance(v, list) else v for k, v in fields.items()}
    return ProcessorConfig(**values)


def _check_fields(file: Path, given: dict[str, Any], kind: type, prefix: str = "") -> None:
    """Check that a table has the fields of a dataclass `kind`.

    Raises:
        ValueError: if fields are unknown or missing.
    """
    fields = dataclasses.fields(kind)
    unknown = sorted(given.keys() - {f.name for f in fields})
    missing = sorted({f.name for f in fields if f.default is dataclasses.MISSING} - given.keys())
    if unknown or missing:
        raise ValueError(f"{file}: {prefix}unknown fields {unknown}, missing fields {missing}")


def has_relative_actions(directory: str | Path) -> bool:
    """Return whether a processor directory contains a robot whose actions are relative to the state."""
    own = [Path(directory), *(Path(directory) / ROBOTS / name for name in robots(directory))]
    return any(read_config(folder).relative_to for folder in own if (folder / FILE_NAME).is_file())


def robots(directory: str | Path) -> list[str]:
    """Return the names of the robots in a processor directory; empty for a single, unnamed robot."""
    return sorted(file.parent.name for file in Path(directory).glob(f"{ROBOTS}/*/{FILE_NAME}"))


def _encode(
    tokenizer: Tokenizer,
    instruction: str,
    config: ProcessorConfig,
    task: prompt.Task = "action",
    answer: Sequence[int] | None = None,
) -> prompt.EncodedPrompt:
    return prompt.build_prefix(tokenizer, instruction, config.views, config.image_tokens, task, answer, config.prompt)


def as_numbers(name: str, value: Any) -> np.ndarray:
    """Convert an array-like of numbers to float64.

    Args:
        name: name of the value, with which an error message begins.
        value: the numbers.

    Raises:
        ValueError: if `value` is anything but numbers.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind in "SUMmc" or isinstance(value, Mapping):
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected an array of numbers") from None


def _check_instruction(instruction: Any) -> None:
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"instruction is {instruction!r}; it must be a sentence")


def _image(view: str, image: Any, resolution: int | None, size: tuple[int, int]) -> np.ndarray:
    """Check an image and resize it to uint8 [*size, 3]; `resolution` None means that it is resized already."""
    resized = image if resolution is None else image_ops.resize(image, resolution, view)
    if resized.shape != (*size, 3):
        raise ValueError(
            f"{view}: an image of (height, width) {np.shape(image)[:2]} becomes {resized.shape[:2]} at resolution "
            f"{resolution}, not {tuple(size)}; send frames of the size the camera had in training"
        )
    return resized


def _flags(name: str, flags: tuple[bool, ...], dims: int) -> np.ndarray:
    """Return the flags as bool [dims]; all are on if none are given."""
    if flags and len(flags) != dims:
        raise ValueError(f"{name} has {len(flags)} flags, but the norm stats have {dims} dims")
    return np.array(flags or (True,) * dims, bool)


def _names(name: str, names: tuple[str, ...], dims: int) -> tuple[str, ...]:
    if names and len(names) != dims:
        raise ValueError(f"{name} has {len(names)} names, but the norm stats have {dims} dims")
    return names or tuple(map(str, range(dims)))


def _place(name: str, names: tuple[str, ...]) -> int:
    """Return the index of the only dim with this name, or -1.

    A number is not a name: dims are not the same just because they have the same index.
    """
    return names.index(name) if names.count(name) == 1 and not name.isdecimal() else -1


def _tuples(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x


def required_prompt_length(
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    views: Sequence[str],
    image_tokens: Sequence[int],
    fast_budget: int = 0,
    template: PromptTemplate = prompt.WALLX,
) -> int:
    """Return T, the number of prefix tokens needed by the longest of the dataset's instructions.

    Args:
        tokenizer: tokenizer with the Wall-X tokens added.
        tasks: the instructions.
        views: camera views, as for `prompt.build_prefix`.
        image_tokens: tokens per image, likewise.
        fast_budget: maximum number of action tokens per chunk for objective "fast"; the two tokens that close the
            answer are added here.
        template: text of the prompt.
    """
    prompts = (prompt.build_prefix(tokenizer, task, views, image_tokens, template=template) for task in tasks)
    longest = max(len(encoded.ids) for encoded in prompts)
    return longest + (fast_budget + prompt.FAST_CLOSING_TOKENS if fast_budget else 0)
