"""Define the shapes and numerics of a Wall-X model as frozen dataclasses, and convert them from and to config.json.

Sources: Qwen2.5-VL's config.json (flat and nested layouts) and upstream wall-x's qwen25_config.json.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wallx_jax.utils.json_fields import field_errors, mismatch, section
from wallx_jax.utils.settings import Choice, setting

IGNORE = -100  # label of a position without a target, as in PyTorch's cross-entropy

# Images as every Qwen2.5-VL and Wall-X model takes them; the image sizes of datasets and chats are derived from these.
PATCH = 14  # side of a patch, in pixels
MERGE = 2  # side of the cell of patches that becomes one token, in patches
FRAMES_PER_TOKEN = 2  # frames of a video in a patch
# CLIP's channel statistics, which Qwen2-VL's image processor uses.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """Qwen2.5-VL vision tower.

    Attributes:
        depth: number of transformer blocks.
        hidden_size: width of the blocks, in channels.
        intermediate_size: width of their MLPs, in channels.
        num_heads: attention heads.
        out_hidden_size: width of the merged tokens, in channels; the decoder's `hidden_size`.
        in_channels: image channels.
        patch_size: side of a patch, in pixels.
        temporal_patch_size: frames in a patch.
        spatial_merge_size: side of the cell of patches that becomes one decoder token, in patches.
        window_size: side of an attention window, in pixels.
        fullatt_block_indexes: blocks that attend over the whole frame instead of windows.
        tokens_per_second: M-RoPE time positions per second of video.
        rms_norm_eps: epsilon of the norms.
        rope_theta: base of the rotary frequencies.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 2048
    in_channels: int = 3
    patch_size: int = PATCH
    temporal_patch_size: int = FRAMES_PER_TOKEN
    spatial_merge_size: int = MERGE
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: float = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def patch_dim(self) -> int:
        """Number of values in a flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """Qwen2.5 decoder.

    Attributes:
        vocab_size: rows of the embedding table.
        hidden_size: width of the residual stream.
        intermediate_size: MLP width of expert "vlm" (0).
        num_hidden_layers: number of layers.
        num_attention_heads: query heads.
        num_key_value_heads: key heads; each serves num_attention_heads / num_key_value_heads query heads.
        rms_norm_eps: epsilon of the norms.
        rope_theta: base of the rotary frequencies.
        mrope_section: rotary channel pairs for time, height and width; their sum is head_dim / 2.
        tie_word_embeddings: use the embedding table as the output projection.
        initializer_range: standard deviation of freshly initialised weights.
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ActionConfig:
    """Expert "action" (1) and the proprioception and action heads.

    Attributes:
        intermediate_size: MLP width of the expert; None: a plain Qwen2.5-VL without expert and heads.
        action_dim: channels of an action.
        state_dim: channels of the robot state.
        beta_alpha: alpha of the flow time distribution.
        beta_beta: beta of the flow time distribution.
        time_scale: upper bound of the flow time.
    """

    intermediate_size: int | None = 2048
    action_dim: int = 20
    state_dim: int = 20
    beta_alpha: float = 1.5
    beta_beta: float = 1.0
    time_scale: float = 0.999  # `s` of upstream's noise_scheduler: t = (1 - u) * s, u ~ Beta(alpha, beta)


@dataclass(frozen=True)
class TokenIds:
    """Token ids with a special meaning to the model; -1 if the vocabulary has no such token."""

    image: int = 151655
    video: int = 151656
    vision_start: int = 151652
    pad: int = 151643
    eos: int = 151645
    propri: int = 151665
    action: int = 151666


class ActionAttention(Choice):
    """Attention among the action tokens, see `Numerics`."""

    BIDIRECTIONAL = "bidirectional"
    CAUSAL = "causal"


class MropeLayout(Choice):
    """Assignment of rotary channels to time, height and width, see `Numerics`."""

    QWEN = "qwen"
    UPSTREAM_CUDA = "upstream_cuda"


class FlowLoss(Choice):
    """Channels that the flow loss averages over, see `Numerics`."""

    ALL = "all"
    VALID = "valid"


class MaskedDims(Choice):
    """Sampling of the action channels that the robot lacks, see `Numerics`."""

    DRIFT = "drift"
    HELD = "held"


class Dtype(Choice):
    """Floating-point types of parameters and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(Choice):
    """Activations saved for the backward pass, see `Numerics`."""

    FULL = "full"
    DOTS = "dots"
    NONE = "none"


class Kernels(Choice):
    """Implementation of linear layers, norms and attention, see `Numerics`."""

    AUTO = "auto"
    XLA = "xla"
    CUDNN = "cudnn"
    CPU = "cpu"


@dataclass(frozen=True)
class Numerics:
    """Numerical choices on which the reference implementations differ, dtypes, rematerialisation, and kernels.

    Saved in checkpoints and exported configs. Strings are accepted for the enumerations.
    """

    action_attention: ActionAttention = setting(
        ActionAttention.BIDIRECTIONAL,
        'attention among the action tokens: "bidirectional" as in lerobot\'s port, or "causal" as in upstream with '
        "flash_attention_2, its shipped default",
    )
    mrope_layout: MropeLayout = setting(
        MropeLayout.QWEN,
        'M-RoPE: "qwen" as in transformers and lerobot, or "upstream_cuda" as in upstream\'s rotary kernel',
    )
    flow_loss: FlowLoss = setting(
        FlowLoss.ALL,
        'mean over "all" channels, masked ones counted as zero (upstream, lerobot), or over the "valid" ones',
    )
    masked_dims: MaskedDims = setting(
        MaskedDims.DRIFT,
        'during sampling, channels that the robot lacks "drift" (upstream, lerobot) or are "held" on the straight line '
        "to the normalised zero (upstream since 2026)",
    )
    param_dtype: Dtype = setting(Dtype.BFLOAT16, "dtype of the parameters and the optimizer's moments")
    compute_dtype: Dtype = setting(Dtype.BFLOAT16, "dtype of the activations")
    float32_islands: bool = setting(
        True, "keep and compute decoder norms and action heads in float32 (lerobot, later upstream)"
    )
    remat: Remat = setting(
        Remat.FULL,
        'activations of each layer that are saved for the backward pass: "full" saves none and recomputes all, "dots" '
        'saves matmul outputs, "none" saves all',
    )
    # "auto" is decided when a program is traced and saved as "auto": a checkpoint is not tied to a kind of device.
    kernels: Kernels = setting(
        Kernels.AUTO,
        'implementation of linear layers, norms and attention: "xla" (plain jax.numpy), "cpu" (custom gradients and '
        'attention tuned for CPUs), "cudnn" (cuDNN flash attention, NVIDIA GPUs), "auto": cpu on CPU devices, xla '
        "elsewhere",
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            kind: Any = option.type
            allowed = (True, False) if kind is bool else tuple(kind)
            if value not in allowed or (kind is bool and not isinstance(value, bool)):
                raise ValueError(f"numerics.{option.name} is {value!r}; choose one of {list(allowed)}")
            object.__setattr__(self, option.name, kind(value))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, see models.lora.

    A linear layer of the decoder, vision tower or language model head is adapted if any of `targets` is found in its
    path ("decoder/layers/attn/q"). The action heads never are: they are small and trained in full.
    """

    rank: int = setting(
        0, "rank of the low-rank adapters, trained instead of the layers they adapt; 0: none", minimum=0
    )
    alpha: float = setting(32.0, "the adapters' output is scaled by alpha / rank", above=0)
    targets: tuple[str, ...] = setting(
        ("decoder/layers/",), "regular expressions for the paths of the linear layers to adapt"
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, module: str) -> bool:
        matches = any(re.search(target, module) for target in self.targets)
        return self.rank > 0 and matches and not module.startswith("action/")


@dataclass(frozen=True)
class WallXConfig:
    """All sections of a model's configuration; the defaults describe wall-oss 3B (see PRESETS).

    Attributes:
        vision: vision tower.
        text: decoder.
        action: action expert and heads.
        tokens: special token ids.
        numerics: numerical choices, dtypes and rematerialisation.
        lora: low-rank adapters.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    action: ActionConfig = field(default_factory=ActionConfig)
    tokens: TokenIds = field(default_factory=TokenIds)
    numerics: Numerics = field(default_factory=Numerics)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def has_action_head(self) -> bool:
        """Whether there are an action expert and heads; a plain Qwen2.5-VL has neither."""
        return self.action.intermediate_size is not None

    def replace(self, **sections: Mapping[str, Any]) -> "WallXConfig":
        """Return a copy with fields inside sections replaced: `config.replace(text={"vocab_size": 10})`."""
        return dataclasses.replace(
            self, **{name: dataclasses.replace(getattr(self, name), **changes) for name, changes in sections.items()}
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "WallXConfig":
        """Read a config from the content of a config.json.

        Args:
            hf: parsed JSON of upstream Wall-X (flat), or of Qwen2.5-VL in its old (flat) or new (`text_config`) layout.

        Raises:
            ValueError: if the model type is another, required fields are missing or values are invalid; lists all
                missing fields or all invalid values in one line.
        """
        if hf.get("model_type") not in (None, "qwen2_5_vl", "wall_x", "wallx"):
            raise ValueError(
                f"config.json: model_type is {hf['model_type']!r}; wallx_jax reads 'qwen2_5_vl' (Wall-X and Qwen2.5-VL)"
            )
        errors: list[str] = []
        text_json = {**hf, **section(hf, "text_config", errors)}
        vision_json = dict(section(hf, "vision_config", errors))
        vision_json.setdefault("in_channels", vision_json.get("in_chans", 3))
        rope = section(text_json, "rope_scaling", errors) or section(text_json, "rope_parameters", errors)
        text_json.setdefault("mrope_section", rope.get("mrope_section"))
        if text_json.get("rope_theta") is None:
            text_json["rope_theta"] = rope.get("rope_theta")
        if "tie_word_embeddings" in hf:
            text_json["tie_word_embeddings"] = hf["tie_word_embeddings"]
        ours = section(hf, "wallx_jax", errors)
        lora = section(ours, "lora", errors, "wallx_jax.")
        missing = [
            f"{prefix}{name}"
            for prefix, values, names in (
                ("", text_json, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads", "num_key_value_heads", "mrope_section")),
                ("vision_config.", vision_json, ("depth", "hidden_size", "intermediate_size", "num_heads",
                                                 "out_hidden_size", "fullatt_block_indexes")),
            )
            for name in names
            if values.get(name) is None
        ]  # fmt: skip
        if missing and not errors:
            raise ValueError(f"config.json lacks {', '.join(missing)}; is this a Qwen2.5-VL or Wall-X config?")
        for kind, values, prefix in (
            (TextConfig, text_json, ""),
            (VisionConfig, vision_json, "vision_config."),
            (Numerics, ours, "wallx_jax."),
            (LoraConfig, lora, "wallx_jax.lora."),
        ):
            errors += field_errors(kind, values, prefix)
        widths = _expert_widths(text_json.get("experts"), errors)
        action, tokens = _action(text_json, widths, errors), _token_ids(text_json, errors)
        if errors:
            raise ValueError(f"config.json: {'; '.join(errors)}")
        text, vision = _section(TextConfig, text_json), _section(VisionConfig, vision_json)
        if widths:
            text = dataclasses.replace(text, intermediate_size=widths[0])
        if errors := _contradictions(text, vision):
            raise ValueError(f"config.json: {'; '.join(errors)}")
        return cls(vision, text, action, tokens, _section(Numerics, ours), _section(LoraConfig, lora))

    def to_hf(self) -> dict[str, Any]:
        """Return upstream's flat config.json, with our numerics under "wallx_jax".

        `from_hf(to_hf())` restores all but the pad, proprioception and action ids, which come from the tokenizer, and,
        for a model without action expert, the numerics, which are written only with one.
        """
        t, v, a = self.text, self.vision, self.action
        hf = {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            **{k: x for k, x in _plain(t).items() if k != "mrope_section"},
            "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_section)},
            "max_position_embeddings": 128000,
            "max_window_layers": 70,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "use_cache": True,
            "torch_dtype": self.numerics.param_dtype.value,
            "eos_token_id": self.tokens.eos,
            "vision_start_token_id": self.tokens.vision_start,
            "image_token_id": self.tokens.image,
            "video_token_id": self.tokens.video,
            "wallx_jax": _plain(self.numerics),
            "vision_config": {
                **_plain(v),
                "in_chans": v.in_channels,
                "hidden_act": "silu",
                "spatial_patch_size": v.patch_size,
            },
        }  # fmt: skip
        if a.intermediate_size is not None:
            hf |= {
                "num_experts": 2,
                "experts": [
                    {"hidden_size": t.hidden_size, "intermediate_size": width, "hidden_act": "silu"}
                    for width in (t.intermediate_size, a.intermediate_size)
                ],
                "dim_inputs": [t.hidden_size, t.hidden_size],
                "attention_moe": False,
                "mlp_moe": True,
                "dof_config": {"action": a.action_dim},
                "agent_pos_config": {"state": a.state_dim},
                "noise_scheduler": {"beta_alpha": a.beta_alpha, "beta_beta": a.beta_beta, "s": a.time_scale,
                                    "num_inference_timesteps": 10},
            }  # fmt: skip
        if self.lora.rank:
            hf["wallx_jax"]["lora"] = _plain(self.lora)
        return hf


def _expert_widths(experts: Any, errors: list[str]) -> list[int]:
    """Return the `intermediate_size` of each expert, [] without experts; append problems to `errors`."""
    if experts is None:
        return []
    given = experts if isinstance(experts, list) else []
    widths: list[Any] = [expert.get("intermediate_size") if isinstance(expert, Mapping) else None for expert in given]
    if len(widths) < 2 or any(mismatch(width, int) for width in widths):
        errors.append("experts: expected a list of two objects with an intermediate_size of at least 1")
    return widths


def _action(text_json: Mapping[str, Any], widths: list[int], errors: list[str]) -> ActionConfig:
    """Parse `dof_config`, `agent_pos_config` and `noise_scheduler`; use upstream's defaults where they are missing."""
    channels = {}
    for name in ("dof_config", "agent_pos_config"):
        table = section(text_json, name, errors)
        wrong = [f"{name}.{key} is {json.dumps(value)}; expected {expected}"
                 for key, value in table.items() if (expected := mismatch(value, int))]  # fmt: skip
        errors += wrong
        channels[name] = 0 if wrong else sum(table.values())
    noise, given = section(text_json, "noise_scheduler", errors), {}
    for name, theirs in (("beta_alpha", "beta_alpha"), ("beta_beta", "beta_beta"), ("time_scale", "s")):
        if (value := noise.get(theirs)) is not None:
            given[name] = value
            if expected := mismatch(value, float):
                errors.append(f"noise_scheduler.{theirs} is {json.dumps(value)}; expected {expected}")
    action = channels["dof_config"] or 20
    state = channels["agent_pos_config"] or action
    return ActionConfig(widths[1] if len(widths) > 1 else None, action, state, **given)


def _token_ids(text_json: Mapping[str, Any], errors: list[str]) -> TokenIds:
    """Parse the special token ids; of a list of ids, which Hugging Face allows, use the first."""
    ids: dict[str, Any] = {}
    for name, theirs in (("image", "image_token_id"), ("video", "video_token_id"), ("eos", "eos_token_id"),
                         ("vision_start", "vision_start_token_id"), ("pad", "pad_token_id")):  # fmt: skip
        value = text_json.get(theirs)
        value = value[0] if isinstance(value, list) and value else value
        if value is not None:
            ids[name] = value
            if expected := mismatch(value, int, least=-1):
                errors.append(f"{theirs} is {json.dumps(value)}; expected {expected}")
    return TokenIds(**ids)


def _contradictions(text: TextConfig, vision: VisionConfig) -> list[str]:
    """Return one message, with config.json's field names, for each combination of sizes that is inconsistent."""
    errors = []
    if text.hidden_size % text.num_attention_heads:
        errors.append(
            f"hidden_size {text.hidden_size} is no multiple of num_attention_heads {text.num_attention_heads}"
        )
    elif len(text.mrope_section) != 3 or 2 * sum(text.mrope_section) != text.head_dim:
        errors.append(
            f"mrope_section {list(text.mrope_section)} must be three sizes that sum to half of the head dimension "
            f"{text.head_dim} (hidden_size / num_attention_heads)"
        )
    if text.num_attention_heads % text.num_key_value_heads:
        errors.append(
            f"num_attention_heads {text.num_attention_heads} is no multiple of num_key_value_heads "
            f"{text.num_key_value_heads}"
        )
    if vision.hidden_size % (4 * vision.num_heads):
        errors.append(
            f"vision_config.hidden_size {vision.hidden_size} is no multiple of 4 x vision_config.num_heads "
            f"{vision.num_heads}"
        )
    if vision.out_hidden_size != text.hidden_size:
        errors.append(f"vision_config.out_hidden_size {vision.out_hidden_size} is not hidden_size {text.hidden_size}")
    if vision.window_size < vision.patch_size * vision.spatial_merge_size:
        errors.append(f"vision_config.window_size {vision.window_size} is less than a patch_size x spatial_merge_size")
    return errors


def _section(kind: type, values: Mapping[str, Any]) -> Any:
    """Build dataclass `kind` from the entries of `values` that are its fields and not None; lists become tuples."""
    names = {f.name for f in dataclasses.fields(kind)}
    return kind(
        **{k: tuple(x) if isinstance(x, list) else x for k, x in values.items() if k in names and x is not None}
    )


def _plain(section: Any) -> dict[str, Any]:
    """Convert a dataclass to a dict for JSON: tuples become lists, enumerations strings."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value.value if isinstance(value, Choice) else value

    return {name: plain(value) for name, value in dataclasses.asdict(section).items()}


TINY = WallXConfig(
    vision=VisionConfig(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
                        fullatt_block_indexes=(1, 3)),
    text=TextConfig(vocab_size=699, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                    num_key_value_heads=2, mrope_section=(2, 3, 3)),
    action=ActionConfig(intermediate_size=32),
    tokens=TokenIds(image=655, video=656, vision_start=652, pad=643, eos=645, propri=665, action=666),
    numerics=Numerics(param_dtype=Dtype.FLOAT32, compute_dtype=Dtype.FLOAT32),
)  # fmt: skip

MID = WallXConfig(
    vision=VisionConfig(depth=8, hidden_size=512, intermediate_size=1376, num_heads=8, out_hidden_size=768,
                        fullatt_block_indexes=(3, 7)),
    text=TextConfig(vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                    num_attention_heads=12, num_key_value_heads=2, mrope_section=(8, 12, 12)),
    action=ActionConfig(intermediate_size=768),
    tokens=TokenIds(image=4055, video=4056, vision_start=4052, pad=4043, eos=4045, propri=4065, action=4066),
    numerics=Numerics(param_dtype=Dtype.FLOAT32, compute_dtype=Dtype.FLOAT32),
)  # fmt: skip

PRESETS = {"tiny": TINY, "mid": MID, "wall_oss_3b": WallXConfig()}
