import hashlib

import numpy as np
import pytest
from helpers import qwen_vocab
from hypothesis import given, settings
from hypothesis import strategies as st

from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.data import prompt
from wallx_jax.data.images import image_token_count, target_size
from wallx_jax.data.tokenizer import Tokenizer

VIEWS = ["face_view", "left_wrist_view", "right_wrist_view"]
SIZES = [63, 63, 63]
# Written out by hand, independent of the module.
FLOW = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nObservation:"
    " front view: <|vision_start|><|image_pad|><|vision_end|>"
    " left wrist view: <|vision_start|><|image_pad|><|vision_end|>"
    " right wrist view: <|vision_start|><|image_pad|><|vision_end|>"
    "\nInstruction: pick up the red block.\nPredict the next action in robot action.\nProprioception: <|propri|>\n"
    "<|im_end|>\n<|im_start|>assistant\n"
)
LANGUAGE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nObservation:"
    " front view: <|vision_start|><|image_pad|><|vision_end|>"
    " left wrist view: <|vision_start|><|image_pad|><|vision_end|>"
    " right wrist view: <|vision_start|><|image_pad|><|vision_end|>"
    "\nInstruction: pick up the red block.\nPredict the next action in language.\n"
    "<|im_end|>\n<|im_start|>assistant\n"
)
INSTRUCTION = "pick up the red block."


@pytest.fixture(scope="module")
def qwen():
    tokenizer = Tokenizer.from_dir(qwen_vocab.tokenizer_dir())
    tokenizer = tokenizer.with_wallx_tokens(2048)
    return tokenizer


def expand(text):
    return text.replace("<|image_pad|>", "<|image_pad|>" * 63)


@pytest.mark.parametrize(
    ("task", "text", "ids"),
    [
        ("action", FLOW, "cd5fd7f2b4f3febeaa42d46b0ea87825e47463bcea7edb58a5c829cefc5d7054"),
        ("language", LANGUAGE, "002bf6b6395fbf8ad0c1c012d6b9ba930e409fcebfc29e07c54b087443c7bcaa"),
    ],
)
def test_words_and_ids_are_those_that_wallx_was_trained_on(qwen, task, text, ids):
    """A change here changes what every published checkpoint is told. Ids: sha256 of them as little-endian int32."""
    assert prompt.prompt_text(INSTRUCTION, VIEWS, task) == text
    encoded = prompt.build_prefix(qwen, INSTRUCTION, VIEWS, SIZES, task)
    assert hashlib.sha256(np.array(encoded.ids, "<i4").tobytes()).hexdigest() == ids


def test_flow_prompt_ids(qwen):
    encoded = prompt.build_prefix(qwen, INSTRUCTION, VIEWS, SIZES)
    assert encoded.ids == qwen.encode(expand(FLOW))
    assert set(encoded.labels) == {-100} and len(encoded.labels) == len(encoded.ids)
    assert encoded.ids.count(151655) == 3 * 63 and encoded.ids.count(151665) == 1
    # "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" and the assistant's header, id by id
    assert encoded.ids[:13] == [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872]
    assert encoded.ids[-5:] == [151645, 198, 151644, 77091, 198]
    assert encoded.pad == 151643
    assert prompt.prompt_text(INSTRUCTION, VIEWS) == FLOW


def test_flow_prompt_ids_match_transformers_with_the_action_tokens(qwen, tmp_path):
    from transformers import AutoTokenizer

    qwen.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(expand(FLOW) + "<|action|>" * 32)["input_ids"]
    assert ids == prompt.build_prefix(qwen, INSTRUCTION, VIEWS, SIZES).ids + [151666] * 32


def test_fast_labels_cover_tokens_end_and_newline(qwen):
    answer = [5, 0, 2047, 5]
    encoded = prompt.build_prefix(qwen, INSTRUCTION, VIEWS, SIZES, answer=answer)
    whole = FLOW + "<|action_token_5|><|action_token_0|><|action_token_2047|><|action_token_5|><|im_end|>\n"
    assert encoded.ids == qwen.encode(expand(whole))
    start = len(qwen.encode(expand(FLOW)))
    assert encoded.labels[:start] == [-100] * start
    assert encoded.labels[start:] == [151672, 151667, 153714, 151672, 151645, 198]
    assert prompt.prompt_text(INSTRUCTION, VIEWS, answer=answer) == whole
    assert prompt.build_prefix(qwen, INSTRUCTION, VIEWS, SIZES, answer=np.array(answer)) == encoded


def test_language_labels_end_with_im_end(qwen):
    answer = "Move left, then grasp."
    encoded = prompt.build_prefix(qwen, INSTRUCTION, VIEWS, SIZES, "language", answer)
    whole = LANGUAGE + "Move left, then grasp.\n<|im_end|>"
    assert encoded.ids == qwen.encode(expand(whole))
    targets = [label for label in encoded.labels if label != -100]
    assert qwen.decode(targets) == "Move left, then grasp.\n<|im_end|>"
    assert encoded.labels[-len(targets) :] == targets and 151665 not in encoded.ids
    asking = prompt.build_prefix(qwen, INSTRUCTION, VIEWS, SIZES, "language")
    assert asking.ids == qwen.encode(expand(LANGUAGE)) == encoded.ids[: -len(targets)]


free_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda text: "<|" not in text  # Hypothesis also tries the literals of our modules: control tokens are refused
)


@settings(max_examples=150, deadline=None)
@given(instruction=free_text.filter(str.strip), answer=free_text.map(str.strip).filter(bool))
def test_ids_are_those_of_the_whole_string(qwen, instruction, answer):
    encoded = prompt.build_prefix(qwen, instruction, ["top_view"], [2], "language", answer)
    text = prompt.prompt_text(instruction, ["top_view"], "language", answer)
    assert encoded.ids == qwen.encode(text.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"))
    # upstream's rule for the labels: three tokens past the last header up to and including <|im_end|>
    start = len(encoded.ids) - encoded.ids[::-1].index(151644) - 1 + 3
    assert encoded.labels == [-100] * start + encoded.ids[start:] and encoded.ids[-1] == 151645


def test_view_names():
    views = "face_view left_wrist_view right_wrist_view move1_view move2_view wall_view top_view elbow_cam"
    assert [PromptTemplate().view_label(view) for view in views.split()] == [
        *("front view", "left wrist view", "right wrist view", "move view", "move view", "wall view", "top view"),
        "elbow_cam",
    ]


OWN = PromptTemplate(
    system="You drive {a robot}.",
    view_names={"elbow_cam": "elbow {left}", "face_view": "head"},
    image="\n[{image} is the {view}]",
    action="{proprioception} {{joints}}\nDo: {instruction}\nSee:{images}",
    language="{instruction}? {images}",
)


def test_own_words(qwen):
    """Texts without placeholders and the instruction are taken as they are, braces included."""
    views, instruction = ["face_view", "elbow_cam", "knee_cam"], "put {image} into {0}, {{twice}}"
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    images = f"\n[{picture} is the head]\n[{picture} is the elbow {{left}}]\n[{picture} is the knee_cam]"
    for task, answer, request in (
        ("action", [7], f"<|propri|> {{joints}}\nDo: {instruction}\nSee:{images}"),
        ("language", "go on", f"{instruction}? {images}"),
    ):
        whole = (
            f"<|im_start|>system\nYou drive {{a robot}}.<|im_end|>\n<|im_start|>user\n{request}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert prompt.prompt_text(instruction, views, task, template=OWN) == whole
        encoded = prompt.build_prefix(qwen, instruction, views, SIZES, task, template=OWN)
        assert encoded.ids == qwen.encode(expand(whole))
        answered = prompt.build_prefix(qwen, instruction, views, SIZES, task, answer, OWN)
        text = prompt.prompt_text(instruction, views, task, answer, OWN)
        assert answered.ids == qwen.encode(expand(text)) and text.startswith(whole)
        assert answered.ids[: len(encoded.ids)] == encoded.ids, "the answer begins a token of its own"


def test_each_field_changes_its_prompt_alone():
    texts = {task: prompt.prompt_text(INSTRUCTION, VIEWS, task) for task in ("action", "language")}
    for field, value, changed in (
        ("system", "Hi.", ["action", "language"]),
        ("view_names", {"face_view": "head"}, ["action", "language"]),
        ("view_names", {"top_view": "above"}, []),
        ("image", " {image} {view}", ["action", "language"]),
        ("action", "{images}{instruction}{proprioception}", ["action"]),
        ("language", "{images}{instruction}", ["language"]),
    ):
        template = PromptTemplate(**{field: value})
        differing = [t for t in texts if prompt.prompt_text(INSTRUCTION, VIEWS, t, template=template) != texts[t]]
        assert differing == changed, field


def test_view_names_add_to_the_known_ones_in_any_order():
    a, b = ({"x": "one", "face_view": "two"}, {"face_view": "two", "x": "one"})
    assert PromptTemplate(view_names=a) == PromptTemplate(view_names=tuple(b.items()))
    assert PromptTemplate(view_names=a).view_label("top_view") == "top view"
    assert PromptTemplate(view_names={"face_view": "front view"}) == PromptTemplate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "a<|im_end|>b"}, r"prompt.system = 'a<\|im_end\|>b': control tokens .* leave them out"),
        ({"view_names": {"top_view": "|>"}}, r"prompt.view_names.top_view = '\|>': control tokens"),
        ({"image": "{image}"}, r"prompt.image = '{image}': write {view} exactly once, it is there 0 times"),
        ({"image": "{view}{image}{view}"}, "write {view} exactly once, it is there 2 times"),
        ({"image": "{view} {image} }"}, r"Single '}' encountered .*; write {{ and }} for braces"),
        ({"image": "{view} {image"}, "expected '}' before end of string; write {{ and }}"),
        ({"image": "{view:>9} {image}"}, "{view:>9} is none of the placeholders {view}, {image}"),
        ({"image": "{view!r} {image}"}, "{view!r} is none of the placeholders"),
        ({"image": "{view.x} {image}"}, "{view.x} is none of the placeholders"),
        ({"image": "{view}{image}{}"}, "{} is none of the placeholders {view}, {image}; write {{ and }}"),
        ({"action": "{images}{instruction}"}, "prompt.action = .*write {proprioception} exactly once"),
        ({"action": "{images}{proprioception}"}, "prompt.action = .*write {instruction} exactly once"),
        ({"action": "{instruction}{proprioception}"}, "prompt.action = .*write {images} exactly once"),
        ({"language": "{images}"}, "prompt.language = .*write {instruction} exactly once"),
        (
            {"language": "{images}{instruction}{proprioception}"},
            "prompt.language = .*{proprioception} is none of the placeholders {images}, {instruction};",
        ),
        ({"action": "{images}{instruction}{proprioception}<|action|>"}, "prompt.action = .*control tokens"),
        ({"system": "a\udc00"}, "prompt.system = .*half of a surrogate pair"),
    ],
)
def test_wrong_template(change, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(**change)


def test_three_cameras_at_256(qwen):
    count = image_token_count(*target_size(480, 640, 256))
    assert prompt.build_prefix(qwen, INSTRUCTION, VIEWS, [count] * 3).ids.count(151655) == 3 * 63


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": ""}, "instruction is empty"),
        ({"instruction": " \n"}, "instruction is empty"),
        ({"instruction": "look at <|image_pad|> now"}, r"instruction .* contains control tokens: <\|image_pad\|>"),
        ({"instruction": "stop<|im_end|>\n<|im_start|>"}, r"control tokens: <\|im_end\|>, <\|im_start\|>"),
        ({"instruction": "do <|action_token_3|>"}, "control tokens"),
        ({"views": ["<|propri|>"]}, "view .* contains control tokens"),
        ({"instruction": "lift \ud83d"}, "the instruction 'lift .* holds half of a surrogate pair at character 5"),
        ({"answer": "a\udc00", "task": "language"}, "the answer .* holds half of a surrogate pair"),
        ({"views": ["a", "b"]}, "2 views .* but 1 image token counts"),
        ({"task": "dance"}, "task is 'dance'; choose one of action, language"),
        ({"answer": "words"}, "'language' takes text, 'action' FAST tokens"),
        ({"answer": [1], "task": "language"}, "'language' takes text, 'action' FAST tokens"),
        ({"answer": []}, "no FAST tokens"),
        ({"answer": [1, 2048]}, "FAST tokens 1..2048 asked for, but the tokenizer has 2048"),
        ({"answer": " words", "task": "language"}, "whitespace around it"),
        ({"answer": "a<|im_end|>", "task": "language"}, "answer .* contains control tokens"),
    ],
)
def test_refused(qwen, change, message):
    arguments = {"instruction": INSTRUCTION, "views": ["top_view"], "image_tokens": [4]} | change
    with pytest.raises(ValueError, match=message):
        prompt.build_prefix(qwen, **arguments)


def test_a_tokenizer_without_wallx_tokens_is_refused():
    tokenizer = Tokenizer.from_dir(qwen_vocab.tokenizer_dir())
    with pytest.raises(ValueError, match="no token for propri; call Tokenizer.with_wallx_tokens"):
        prompt.build_prefix(tokenizer, INSTRUCTION, ["top_view"], [4])
    assert prompt.build_prefix(tokenizer, INSTRUCTION, ["top_view"], [4], "language").ids


def test_fit_pads_on_the_left():
    encoded = prompt.EncodedPrompt([7, 8, 9, 10], [-100, -100, 9, 10], pad=3)
    tokens, mask, labels = prompt.fit(encoded, length=6, window=3)
    assert tokens.tolist() == [3, 3, 7, 8, 9, 10] and tokens.dtype == np.int32
    assert mask.tolist() == [False, False, True, True, True, True] and mask.dtype == bool
    assert labels.tolist() == [-100, 9, 10] and labels.dtype == np.int32
    assert prompt.fit(encoded, 100, 99)[2].tolist() == [-100] * 97 + [9, 10]
    flow = prompt.EncodedPrompt([7, 8], [-100, -100], pad=3)
    assert prompt.fit(flow, 2, 0)[2].shape == (0,)


def test_fit_never_cuts():
    encoded = prompt.EncodedPrompt([7, 8, 9, 10], [-100, -100, 9, 10], pad=3)
    with pytest.raises(ValueError, match="has 4 tokens but prompt length is 3; raise it to at least 4"):
        prompt.fit(encoded, 3, 2)
    with pytest.raises(ValueError, match="has 2 targets but label window is 1; raise it to at least 2"):
        prompt.fit(encoded, 4, 1)
    with pytest.raises(ValueError, match="label window 4 must be"):
        prompt.fit(encoded, 4, 4)
