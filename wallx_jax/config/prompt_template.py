"""Define and validate the configurable prompt text around images, instruction and proprioception.

The defaults are what the published Wall-X weights were trained with (wall_x/data/utils.py upstream); even a changed
space changes the token ids. The chat format (roles, turns, control tokens) is fixed: see data/prompt.py.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

from wallx_jax.utils.settings import setting

VIEW_NAMES = {
    "face_view": "front view",
    "left_wrist_view": "left wrist view",
    "right_wrist_view": "right wrist view",
    "move1_view": "move view",
    "move2_view": "move view",
    "wall_view": "wall view",
    "top_view": "top view",
}

# Placeholders that each template must contain exactly once; the other texts are used verbatim.
PLACEHOLDERS = {
    "image": ("{view}", "{image}"),
    "action": ("{images}", "{instruction}", "{proprioception}"),
    "language": ("{images}", "{instruction}"),
}


@dataclass(frozen=True)
class PromptTemplate:
    """Prompt texts. In those with placeholders, each occurs once, and literal braces are written {{ and }}.

    `view_names` may be given as a mapping or as pairs; it is added to VIEW_NAMES and stored as sorted pairs.

    Raises:
        ValueError: `template_errors` finds an invalid text.
    """

    system: str = setting("You are a helpful assistant.", "text of the system turn")
    view_names: Mapping[str, str] | tuple[tuple[str, str], ...] = setting(
        VIEW_NAMES,
        "{view: text in the prompt}, added to these; other views use their own name",
        entry=(lambda words: isinstance(words, str) and words.strip() != "", "the words for this view"),
    )
    image: str = setting(" {view}: {image}", "text per camera: {view} is its view_names text, {image} its image tokens")
    action: str = setting(
        "Observation:{images}\nInstruction: {instruction}\nPredict the next action in robot action.\n"
        "Proprioception: {proprioception}\n",
        "user turn that asks for robot actions; {images} is the image text of all cameras",
    )
    language: str = setting(
        "Observation:{images}\nInstruction: {instruction}\nPredict the next action in language.\n",
        "user turn that asks for the next subtask as text",
    )

    def __post_init__(self) -> None:
        names = VIEW_NAMES | dict(self.view_names)
        object.__setattr__(self, "view_names", tuple(sorted(names.items())))
        if errors := template_errors(**dataclasses.asdict(self) | {"view_names": names}):
            raise ValueError("; ".join(errors))

    def view_label(self, view: str) -> str:
        """Return the prompt text for a camera view; by default the view's own name."""
        return dict(self.view_names).get(view, view)


def template_errors(view_names: Mapping[str, str], **texts: str) -> list[str]:
    """Return one error with the remedy per invalid text of a template, named by its configuration key."""
    texts |= {f"view_names.{view}": words for view, words in view_names.items()}
    problems = {name: _problems(text, PLACEHOLDERS.get(name)) for name, text in texts.items()}
    return [f"prompt.{name} = {texts[name]!r}: {'; '.join(found)}" for name, found in problems.items() if found]


def _problems(text: str, placeholders: tuple[str, ...] | None) -> list[str]:
    problems = []
    if "<|" in text or "|>" in text:
        problems.append("control tokens (<|...|>) belong to the chat frame and the placeholders; leave them out")
    if any("\ud800" <= character <= "\udfff" for character in text):
        problems.append("half of a surrogate pair is no text; write whole characters")
    if placeholders is None:
        return problems
    braces = "write {{ and }} for braces that are text"
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(text) if name is not None]
        found = [_placeholder(name, spec or "", conversion) for name, spec, conversion in parts]
    except ValueError as error:
        return [*problems, f"{error}; {braces}"]
    if unknown := [name for name in found if name not in placeholders]:
        problems.append(f"{', '.join(unknown)} is none of the placeholders {', '.join(placeholders)}; {braces}")
    for name in placeholders:
        if (count := found.count(name)) != 1:
            problems.append(f"write {name} exactly once, it is there {count} times")
    return problems


def _placeholder(name: str, spec: str, conversion: str | None) -> str:
    """Return a placeholder as written, with its conversion and format spec.

    These would change what is inserted, so a placeholder that has one matches none of the known ones.
    """
    return "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
