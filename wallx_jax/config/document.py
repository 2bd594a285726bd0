"""Generate docs/configuration.md, which describes every setting.

python -m wallx_jax.config.document > docs/configuration.md
"""

from typing import Any

from wallx_jax.config.defaults import SETTINGS
from wallx_jax.utils.settings import Setting, bound_text

INTRODUCTION = """\
# Configuration

All settings of a run, with their defaults. A file in `configs/` returns a changed `wallx_jax.config.default_config()`;
the command line changes single settings of it, and of a table an entry or the whole:

```bash
python -m wallx_jax.train --config=configs/aloha.py --config.learning_rate=6e-5 --config.numerics.remat=dots \\
    --config.frame_cache=None --config.predict_action_keys='("left_gripper",)' \\
    --config.resolution.face_view=224 --config.camera_views='{"face_view": "observation.images.cam_high"}'
```

Unknown keys, values of another type and values out of range are errors, which are reported together before any weights
are loaded. "–" is None, not set: the description says what applies then.

The datasets of a mixture (`datasets`) may each set what is marked *, and have the first dataset's values otherwise,
except for what is marked †: that is each dataset's own.

This page is generated: `python -m wallx_jax.config.document > docs/configuration.md`.
"""
# {first key: heading of the part that begins there, and what applies to all of it}
PARTS = {
    "pretrained_wallx_path": ("Model", ""),
    "numerics.action_attention": (
        "Numerics",
        "If not set: the checkpoint's value if it has one, else the one in parentheses.",
    ),
    "robot_name": ("Robot", ""),
    "repo_id": (
        "Dataset",
        "Each placeholder in a text of `prompt` occurs exactly once; literal braces are written `{{` and `}}`.",
    ),
    "optimizer": ("Optimization", "Steps are optimizer updates."),
    "platform": ("Devices", ""),
    "distributed.coordinator": (
        "Processes",
        "Set all three, or none: then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, SLURM or Open\n"
        "MPI apply, else there is a single process. They are the same in every process, except `process_id`.",
    ),
    "save_path": ("Checkpoints, validation and logging", "Steps are optimizer updates."),
}


def page() -> str:
    """Return the text of docs/configuration.md: an introduction, and a table of settings per part."""
    lines = [INTRODUCTION.rstrip()]
    for key, setting in SETTINGS.items():
        if key in PARTS:
            heading, note = PARTS[key]
            lines += ["", f"## {heading}", "", *([note, ""] if note else [])]
            lines += ["| key | type | default | values | description |", "|---|---|---|---|---|"]
        marks = "*" * setting.per_dataset + "†" * (not setting.inherited)
        doc = f"{setting.doc} (with {setting.only_with})" if setting.only_with else setting.doc
        cells = (f"`{key}` {marks}".rstrip(), _type(setting), _default(setting), _values(setting), _text(doc))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _type(setting: Setting) -> str:
    names: dict[type, str] = {dict: "table", tuple: "tuple of str"}
    return names.get(setting.kind, setting.kind.__name__)


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    if setting.fallback is not None:
        return f"– ({_code(setting.fallback)})"
    return "–" if setting.default is None else "empty" if setting.default in ({}, ()) else _code(setting.default)


def _values(setting: Setting) -> str:
    """Return the choices, the range as an inequality, or what the entries of a table are."""
    if setting.entry:
        return _text(setting.entry[1])
    if setting.choices:
        return ", ".join(map(_code, setting.choices))
    lower = [f"{setting.minimum} ≤"] if setting.minimum is not None else []
    lower = [f"{setting.above} <"] if setting.above is not None else lower
    upper = [f"≤ {setting.maximum}"] if setting.maximum is not None else []
    upper = [f"< {bound_text(setting.below)}"] if setting.below is not None else upper
    if lower and not upper:
        return {"<": f"> {setting.above}", "≤": f"≥ {setting.minimum}"}[lower[0][-1]]
    return " ".join([*lower, "x", *upper]) if lower or upper else ""


def _code(value: Any) -> str:
    return f"`{_text(value if isinstance(value, str) else repr(value))}`"


def _text(text: str) -> str:
    """Return text as it is written in a cell of a table."""
    return text.replace("\n", "\\n").replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
