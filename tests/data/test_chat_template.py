"""Chat templates render as transformers renders them, without transformers."""

import numpy as np
import pytest
from PIL import Image

from wallx_jax.data import chat, chat_template

# Qwen2.5-VL-3B-Instruct's own, from its chat_template.json.
QWEN = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message "
    "in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a "
    "helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] "
    "is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% "
    "if content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set "
    "image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: "
    "{% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' "
    "in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ "
    "video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in "
    "content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FEATURES = {
    "trim_blocks": "{% if true %}\nline\n{% endif %}\nend\n",
    "lstrip_blocks": "a\n    {% for m in messages %}\n  {{ m.role }}\n    {% endfor %}\n\t{# a comment #}\nb",
    "whitespace control": "a \n {%- if true -%} \n b {{- ' c ' -}} d {%- endif %}\n",
    "autoescape is off": "{{ messages[-1].content[0].text }} & < >",
    "tojson": "{{ messages | tojson }}",
    "tojson with arguments": "{{ {'b': 'ä<', 'a': [1, 2.5, none]} | tojson(indent=2, sort_keys=true) }}"
    "{{ 'ä' | tojson(ensure_ascii=true) }}{{ {'a': 1, 'b': 2} | tojson(separators=(',', ':')) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y %%') }}",
    "generation": "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}\n {{ m.role }}{{ x }} "
    "{% endgeneration %}\n{% endfor %}{{ x }}",
    "namespaces and macros": "{% macro show(m) %}[{{ m.role }}]{% endmacro %}{% set n = namespace(k=0) %}"
    "{% for m in messages %}{% set n.k = n.k + 1 %}{{ show(m) }}{% endfor %}{{ n.k }}{{ dict(a=1) }}",
    "names that are not set": "{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ tools is defined }}"
    "{{ add_generation_prompt }}{{ add_vision_id is defined }}",
    "strings": "{{ messages[-1].content[0].text.strip().upper().split(' ')[0] }}{{ 'a=b'.partition('=')[2] }}",
}
MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": " be <short> & 'ä' \n"}]},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": np.zeros((56, 56, 3), np.uint8)},
            {"type": "text", "text": "what is this?\n"},
            {"type": "video", "video": [np.zeros((56, 56, 3), np.uint8)] * 2, "fps": 2},
            {"type": "image", "image": Image.new("RGB", (56, 56))},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "a robot"}]},
    {"role": "user", "content": [{"type": "text", "text": "and <b>that</b>?"}]},
]


def without_pixels(messages: list[dict]) -> list[dict]:
    """The conversation as templates see it, which no template can tell from one with pixels except by printing them."""
    kinds = {"image": "<image>", "video": "<video>"}
    return [
        m | {"content": [{"type": p["type"], p["type"]: kinds.get(p["type"], p.get("text"))} for p in m["content"]]}
        for m in messages
    ]


@pytest.mark.parametrize("template", [QWEN, chat.TEMPLATE, *FEATURES.values()], ids=["Qwen", "TEMPLATE", *FEATURES])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:]], ids=["with a system turn", "without"])
def test_renders_as_transformers(template, messages):
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template(
        [without_pixels(messages)], chat_template=template, add_generation_prompt=True
    )
    assert chat_template.render(template, messages) == expected


def test_the_built_in_template_is_qwens():
    assert chat_template.render(QWEN, MESSAGES) == chat_template.render(chat.TEMPLATE, MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "rejects this conversation: roles must alternate"),
        ("{% for m in messages %}", "rejects this conversation: .*endfor"),
        ("{{ messages[0].nothing.more }}", "rejects this conversation: .*nothing"),
        ("{{ messages[0].content + 'text' }}", r"cannot render this conversation \(TypeError: can only concatenate"),
        ("{{ 1 / 0 }}", r"cannot render this conversation \(ZeroDivisionError"),
        ("{{ range(1000000000) }}", r"cannot render this conversation \(OverflowError"),
    ],
)
def test_a_template_that_fails_is_one_error(template, message):
    with pytest.raises(ValueError, match=f"the tokenizer's chat template {message}"):
        chat_template.render(template, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
    ],
)
def test_templates_are_confined(template):
    with pytest.raises(ValueError, match="rejects this conversation"):
        chat_template.render(template, MESSAGES)


@pytest.mark.parametrize("attribute", ["tofile('x')", "dump('x')", "save('x')", "shape", "size"])
def test_a_template_does_not_reach_the_pixels(attribute):
    with pytest.raises(ValueError, match="rejects this conversation: .* has no attribute"):
        chat_template.render(
            "{% for p in messages[1].content %}{{ p.image." + attribute + " + 1 }}{% endfor %}", MESSAGES
        )
