"""Renders a conversation as text with a tokenizer's Jinja chat template, in the environment that transformers defines.

Templates come with the weights, that is from strangers: they run in Jinja's sandbox and see nothing but text.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """Reads `{% generation %}...{% endgeneration %}`, which marks text for training masks, as a plain block."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def render(template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Render a conversation up to where the assistant's turn begins.

    Args:
        template: the Jinja template.
        messages: {"role": text, "content": list of parts}; of a part that is not text, the template sees the type only.

    Raises:
        ValueError: the template is malformed, or refuses the conversation.
    """
    seen = [{"role": m["role"], "content": [_seen(part) for part in m["content"]]} for m in messages]
    try:
        return _compiled(template).render(messages=seen, tools=None, documents=None, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template rejects this conversation: {error}") from None
    except Exception as error:  # a template is a program, which fails as programs do
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the tokenizer's chat template cannot render this conversation ({reason})") from error


def _seen(part: Mapping[str, Any]) -> dict[str, str]:
    """Return a part without the pixels of an image or video: arrays have methods that the sandbox does not stop."""
    kind = part["type"]
    return {"type": kind, kind: part["text"] if kind == "text" else f"<{kind}>"}


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON for a prompt; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
