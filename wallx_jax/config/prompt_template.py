"""The words of the prompt around images, instruction and proprioception, which a run may change.

The defaults are those that the published Wall-X weights were trained on (wall_x/data/utils.py upstream); a changed
space changes the token ids. The chat frame (roles, turns, control tokens) is fixed: see data/prompt.py.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

VIEW_NAMES = {
    "face_view": "front view",
    "left_wrist_view": "left wrist view",
    "right_wrist_view": "right wrist view",
    "move1_view": "move view",
    "move2_view": "move view",
    "wall_view": "wall view",
    "top_view": "top view",
}

# What each text with placeholders must contain, once each; the other texts are taken as they are.
PLACEHOLDERS = {
    "image": ("{view}", "{image}"),
    "action": ("{images}", "{instruction}", "{proprioception}"),
    "language": ("{images}", "{instruction}"),
}


@dataclass(frozen=True)
class PromptTemplate:
    """The texts of a prompt. In those with placeholders, {{ and }} stand for braces.

    system: what the system turn says.
    view_names: words for camera views, as a mapping or pairs; added to VIEW_NAMES and kept as sorted pairs.
    image: one camera; {view} is its words, {image} its picture.
    action: the user turn that asks for robot actions; {images} is every camera's `image`.
    language: the user turn that asks for the next subtask in words.

    Raises:
        ValueError: if `template_errors` finds any.
    """

    system: str = "You are a helpful assistant."
    view_names: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    image: str = " {view}: {image}"
    action: str = (
        "Observation:{images}\nInstruction: {instruction}\nPredict the next action in robot action.\n"
        "Proprioception: {proprioception}\n"
    )
    language: str = "Observation:{images}\nInstruction: {instruction}\nPredict the next action in language.\n"

    def __post_init__(self):
        names = VIEW_NAMES | dict(self.view_names)
        object.__setattr__(self, "view_names", tuple(sorted(names.items())))
        if errors := template_errors(**dataclasses.asdict(self) | {"view_names": names}):
            raise ValueError("; ".join(errors))

    def view_label(self, view: str) -> str:
        """The words for a camera view; a view without any keeps its own name."""
        return dict(self.view_names).get(view, view)


def template_errors(view_names: Mapping[str, str], **texts: str) -> list[str]:
    """What is wrong with the texts of a template, under the names of the configuration: an entry for each wrong text,
    with the remedy."""
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
        found = [_placeholder(*part[1:]) for part in Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        return [*problems, f"{error}; {braces}"]
    if unknown := [name for name in found if name not in placeholders]:
        problems.append(f"{', '.join(unknown)} is none of the placeholders {', '.join(placeholders)}; {braces}")
    for name in placeholders:
        if (count := found.count(name)) != 1:
            problems.append(f"write {name} exactly once, it is there {count} times")
    return problems


def _placeholder(name: str, spec: str, conversion: str | None) -> str:
    """As it is written: a conversion or a format would change what is inserted, so that none is known."""
    return "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
