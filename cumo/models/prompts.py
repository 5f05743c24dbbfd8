# SPDX-License-Identifier: Apache-2.0
"""Conversations as text and ids: the published prompts, as data.

A conversation becomes segments of text that are trained on or not, so labels follow from its structure, whatever a
user writes; nothing searches the text for the end of a question.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cumo.models.tokenizer import IMAGE_TOKEN

IGNORE_INDEX = -100
USERS = ("human", "user")
ASSISTANTS = ("gpt", "assistant")
_SYSTEM = "{system}"
_BOS, _EOS = "<s>", "</s>"
_TOKENS = re.compile(f"{_BOS}|{_EOS}")
# How ChatML, Llama 3 and many after them write control tokens
_MARKER = re.compile(r"<\|[^<>|]+\|>")
_OPENINGS = ("opening", "opening_without_system")


def _first_marker(text: str) -> str:
    """Return the control token that a text begins with, or ""."""
    match = _MARKER.match(text)
    return match[0] if match else ""


@dataclass(frozen=True, kw_only=True)
class Template:
    """What stands around the turns of a conversation.

    The system prompt, if any, replaces `{system}` in `opening`. With `only_images` the words of the user are left out.
    `<s>` and `</s>` stand for BOS and EOS; see `with_tokens`. Text like `<|im_start|>` is a control token, which the
    tokenizer must have. The tokenizer's BOS, if any, comes before the opening; one that is the control token with which
    the opening begins (SmolLM's `<|im_start|>`) comes once.

    Raises:
        ValueError: a system prompt has no place in `opening` or one elsewhere, or a field contains `<image>`.
    """

    name: str = "custom"
    system: str = ""
    opening: str
    """Before the first user's text, with a system prompt."""
    opening_without_system: str
    before_user: str
    """Before a further user's text."""
    after_user: str
    before_answer: str
    """Trained on, as are the answer and `after_answer`."""
    after_answer: str
    only_images: bool = False

    def __post_init__(self) -> None:
        if self.system and _SYSTEM not in self.opening:
            raise ValueError(f"opening: expected {_SYSTEM}, the place of the system prompt, got {self.opening!r}")
        for name, text in self._texts().items():
            if name != "opening" and _SYSTEM in text:
                raise ValueError(f"{name}: expected no {_SYSTEM}, whose place is in opening, got {text!r}")
            if IMAGE_TOKEN in text:
                raise ValueError(f"{name}: expected no {IMAGE_TOKEN}, which a user's turn has, got {text!r}")

    def _texts(self) -> dict[str, str]:
        """Return the texts that stand around turns, by the names of their fields."""
        names = (*_OPENINGS, "before_user", "after_user", "before_answer", "after_answer")
        return {name: getattr(self, name) for name in names}

    @property
    def markers(self) -> set[str]:
        """Control tokens such as `<|im_start|>` in the template."""
        return {marker for text in self._texts().values() for marker in _MARKER.findall(text)}

    def with_tokens(self, tokenizer: Any) -> Template:
        """Return the template with the BOS and EOS of a tokenizer. A BOS is left out where it has none, as Qwen's.

        Raises:
            ValueError: `tokenizer` has no EOS, with which every answer ends, or not all `markers` as special tokens.
        """
        if tokenizer.eos_token is None:
            raise ValueError("tokenizer: expected one with an EOS token, with which answers end, got none")
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        if absent := sorted(self.markers - special):
            raise ValueError(
                f"tokenizer: expected the markers of template {self.name!r} as special tokens, got one without {absent}"
            )
        bos = tokenizer.bos_token or ""
        tokens: dict[str, str] = {_BOS: bos, _EOS: tokenizer.eos_token}
        texts = self._texts()
        for name in _OPENINGS:
            if _first_marker(texts[name]) == bos:
                texts[name] = texts[name].removeprefix(bos)
        changes: dict[str, Any] = {
            name: _TOKENS.sub(lambda match: tokens[match[0]], text) for name, text in texts.items()
        }
        return dataclasses.replace(self, **changes)


_ASSISTANT = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="plain",
            opening="",
            opening_without_system="",
            before_user="",
            after_user="",
            before_answer="",
            after_answer="\n",
            only_images=True,
        ),
        Template(
            name="mistral_instruct_system",
            system=_ASSISTANT.replace("{who}", "user"),
            # The tokenizer puts a second BOS in front: the released weights have learnt it so.
            opening="<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
            opening_without_system="<s>[INST] ",
            before_user="[INST] ",
            after_user=" [/INST]",
            before_answer=" ",
            after_answer=" </s>",
        ),
        Template(
            name="llava_v1",
            system=_ASSISTANT.replace("{who}", "human"),
            opening="{system} USER: ",
            opening_without_system="USER: ",
            before_user="USER: ",
            after_user=" ASSISTANT:",
            before_answer=" ",
            after_answer="</s>",
        ),
        Template(
            name="chatml",  # Qwen, SmolLM and others, whose EOS is <|im_end|>
            system="You are a helpful assistant.",
            opening="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
            opening_without_system="<|im_start|>user\n",
            before_user="\n<|im_start|>user\n",
            after_user="<|im_end|>\n<|im_start|>assistant\n",
            before_answer="",
            after_answer="</s>",
        ),
        Template(
            name="llama_3",
            opening=f"{_header('system')}{{system}}<|eot_id|>{_header('user')}",
            opening_without_system=_header("user"),
            before_user=_header("user"),
            after_user=f"<|eot_id|>{_header('assistant')}",
            before_answer="",
            after_answer="</s>",
        ),
    )
}


def get_template(template: Template | str) -> Template:
    """The template of that name; a template itself is passed through.

    Raises:
        ValueError: `template` is no name in `TEMPLATES`.
    """
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {list(TEMPLATES)}, got {template!r}")
    return TEMPLATES[template]


# A picture comes before the words of its message, as published; of several, each stands where it was put.
_RENDER = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}"
    "{%- set images = content | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- if images == 1 -%}{{- '<image>\\n' -}}{%- endif -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- elif part['type'] == 'image' -%}{%- if images > 1 -%}{{- '<image>\\n' -}}{%- endif -%}"
    "{%- else -%}{{- raise_exception('content: expected parts of type text or image, got ' + part['type']) -}}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)


def _literal(text: str) -> str:
    """Return a text as a string of Jinja, which reads no pairs of surrogates, as JSON writes for what is not ASCII."""
    return json.dumps(text, ensure_ascii=False)


def _expression(text: str) -> str:
    """A text as Jinja, in which control tokens are those of the tokenizer."""
    names = {_BOS: "bos", _EOS: "eos_token", _SYSTEM: "system"}
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return " + ".join(names.get(piece) or _literal(piece) for piece in pieces if piece) or "''"


def _opening(text: str) -> str:
    """Return an opening as Jinja, behind a BOS; see `Template`."""
    marker = _first_marker(text)
    rest = _expression(text.removeprefix(marker))
    return f"('' if bos == {_literal(marker)} else {_literal(marker)}) + {rest}" if marker else rest


def chat_template(template: Template | str) -> str:
    """A template as Jinja for `apply_chat_template`, which lets no tokenizer add a BOS: it stands here.

    Args:
        template: a template or its name.

    Raises:
        ValueError: `template` is no name in `TEMPLATES`, or leaves out the words of the user.
    """
    template = get_template(template)
    if template.only_images:
        raise ValueError(f"template: expected one with the words of the user, got {template.name!r}")
    refused = f"messages: expected no system prompt for template {template.name!r}"
    without_place = "" if _SYSTEM in template.opening else f"{{{{- raise_exception({_literal(refused)}) -}}}}"
    return (
        _RENDER + "{%- set bos = bos_token or '' -%}"
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{%- set system = render(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
        "{%- else -%}"
        f"{{%- set system = {_literal(template.system)} -%}}{{%- set turns = messages -%}}"
        "{%- endif -%}"
        f"{{%- if system -%}}{without_place}{{%- set opening = {_opening(template.opening)} -%}}"
        f"{{%- else -%}}{{%- set opening = {_opening(template.opening_without_system)} -%}}{{%- endif -%}}"
        "{{- bos -}}"
        "{%- for message in turns -%}"
        "{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}"
        "{{- raise_exception('messages: expected user and assistant in turns, got ' + message['role']"
        " + ' as message ' + loop.index | string) -}}"
        "{%- elif message['role'] == 'user' -%}"
        f"{{%- if not loop.first -%}}{{{{- {_expression(template.before_user)} -}}}}"
        "{%- else -%}{{- opening -}}{%- endif -%}"
        f"{{{{- render(message['content']) + {_expression(template.after_user)} -}}}}"
        f"{{%- else -%}}{{{{- {_expression(template.before_answer)} + render(message['content'])"
        f" + {_expression(template.after_answer)} -}}}}"
        "{%- endif -%}{%- endfor -%}"
    )


def chat_templates() -> dict[str, str]:
    """Return the chat templates by name, of all templates with the words of the user."""
    return {name: chat_template(template) for name, template in TEMPLATES.items() if not template.only_images}


CHAT_TEMPLATE = chat_template("mistral_instruct_system")


class Segment(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    trained: bool


class Encoded(NamedTuple):
    """Ids of a conversation, and what is learnt from it."""

    input_ids: list[int]
    labels: list[int]
    """The id where it is trained on, `IGNORE_INDEX` elsewhere."""


def _image_first(text: str) -> str:
    """A single picture of a turn comes before its words, as published; several stay where they were put."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def render(
    template: Template | str, turns: Sequence[Mapping[str, Any]], *, system: str | None = None, sample: object = None
) -> list[Segment]:
    """Segments of a conversation, whose joined text is the prompt.

    Args:
        template: a template or its name.
        turns: LLaVA's `conversations`: {"from": "human" or "gpt", "value": text} in turns. What the assistant says
            before the first question is left out. Ends the conversation with a question, its answer is to be generated.
        system: in place of the template's system prompt; "" for none.
        sample: what errors call the conversation.

    Raises:
        ValueError: `turns` hold no question, or speakers that are unknown or do not take turns; or the template has no
            place for a system prompt.

    Examples:
        >>> turns = [{"from": "human", "value": "What is it? <image>"}, {"from": "gpt", "value": "A cat."}]
        >>> for segment in render("llava_v1", turns, system=""):  # the picture comes first, only the answer is trained
        ...     print(segment)
        Segment(text='USER: <image>\\nWhat is it? ASSISTANT:', trained=False)
        Segment(text=' A cat.</s>', trained=True)
    """
    template = get_template(template)
    turns = list(turns)
    for index, turn in enumerate(turns):
        if turn.get("from") not in USERS + ASSISTANTS or not isinstance(turn.get("value"), str):
            raise ValueError(f"sample {sample}: turn {index}: expected from (human or gpt) and value, got {dict(turn)}")
    if turns and turns[0]["from"] in ASSISTANTS:
        turns = turns[1:]
    if not turns:
        raise ValueError(f"sample {sample}: expected a question in conversations, got none")
    system = template.system if system is None else system
    if system and _SYSTEM not in template.opening:
        raise ValueError(f"sample {sample}: expected no system prompt for template {template.name!r}, got {system!r}")
    opening = template.opening.replace(_SYSTEM, system) if system else template.opening_without_system
    segments = []
    for index, turn in enumerate(turns):
        speakers, text = (ASSISTANTS if index % 2 else USERS), turn["value"]
        if turn["from"] not in speakers:
            raise ValueError(f"sample {sample}: expected {speakers[0]} to speak next, got {turn['from']}: {text!r}")
        if index % 2:
            segments.append(Segment(template.before_answer + text + template.after_answer, True))
            continue
        text = IMAGE_TOKEN * text.count(IMAGE_TOKEN) if template.only_images else _image_first(text)
        segments.append(Segment((template.before_user if index else opening) + text + template.after_user, False))
    return segments


def render_text(template: Template | str, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The prompt of a conversation; see `render`."""
    return "".join(segment.text for segment in render(template, turns, **options))


def encode(tokenizer: Any, segments: Sequence[Segment], image_token_id: int) -> Encoded:
    """Ids and labels of segments; each `<image>` becomes one `image_token_id`, which is never trained on.

    Args:
        tokenizer: a fast tokenizer. Its BOS token, if it has one, comes first whatever the text begins with.
        segments: of `render`.
        image_token_id: any integer.
    """
    text = "".join(segment.text for segment in segments)
    trained = [segment.trained for segment in segments for _ in segment.text]
    input_ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORE_INDEX] * len(input_ids)
    begin = 0
    for index, chunk in enumerate(text.split(IMAGE_TOKEN)):
        if index:
            input_ids.append(image_token_id)
            labels.append(IGNORE_INDEX)
            begin += len(IMAGE_TOKEN)
        # A chunk is tokenized at once, across segments: a token belongs to the segment in which it begins.
        encoding = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True)
        for token, (offset, _) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            input_ids.append(token)
            labels.append(token if trained[begin + offset] else IGNORE_INDEX)
        begin += len(chunk)
    return Encoded(input_ids, labels)


def encode_sample(tokenizer: Any, sample: Mapping[str, Any], template: Template | str, image_token_id: int) -> Encoded:
    """Ids and labels of a sample in LLaVA's format: {"id": ..., "conversations": [...]}; see `render` and `encode`."""
    template = get_template(template).with_tokens(tokenizer)
    return encode(tokenizer, render(template, sample["conversations"], sample=sample.get("id")), image_token_id)
