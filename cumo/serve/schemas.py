# SPDX-License-Identifier: Apache-2.0
"""Requests of OpenAI's chat API, as far as this server supports them.

A field that would change an answer and is not supported is refused, unless its value asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

# Fields of OpenAI's API that have no effect here.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Fields that would change an answer, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Fields of a message that this server never fills, and accepts if empty.
OF_ANSWERS = ("refusal", "annotations", "audio", "function_call", "tool_calls")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _in_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("expected Unicode, without halves of characters") from error
    return text


Text = Annotated[str, AfterValidator(_in_unicode)]


class TextPart(_Model):
    """Text part of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Model):
    """Location of a picture."""

    url: Text
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted without effect: every picture is encoded at every scale of the model."""


class ImagePart(_Model):
    """Picture part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


# Tags are not identifiers, so that errors can leave them out of a field's path.
def _part_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url") else None


def _content_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "<string>"
    return "<list>" if isinstance(value, list) and value else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        _part_tag, custom_error_type="part", custom_error_message="expected a part of type text or image_url"
    ),
]
Content = Annotated[
    Annotated[Text, Tag("<string>")] | Annotated[list[Part], Tag("<list>")],
    Discriminator(
        _content_tag, custom_error_type="content", custom_error_message="expected a string or a list of parts"
    ),
]


class Message(_Model):
    """One message. Answers come back with the empty fields that OpenAI's client gives them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: field for name, field in value.items() if field or name not in OF_ANSWERS}


class StreamOptions(_Model):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Model):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63) + 1, le=2**63 - 1)
    stop: list[Text] | None = None
    """Strings that end the answer; a single string becomes a list."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object with messages")
        for name, neutral in NEUTRAL.items():
            given = value.get(name)
            if given is not None and given not in neutral:
                raise ValueError(f"{name}: this server does not support it; expected it to be left out")
        return {key: item for key, item in value.items() if key not in IGNORED and key not in NEUTRAL}

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_kind(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if stops is not None and not (
            isinstance(stops, list) and len(stops) <= 4 and all(isinstance(each, str) and each for each in stops)
        ):
            raise ValueError("expected a string or up to 4 strings, none of them empty")
        return stops

    @property
    def token_limit(self) -> int | None:
        """Largest number of answer tokens, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class RoutingRequest(_Model):
    """Body of `POST /cumo/routing`."""

    image: str
    """Data URL of a picture."""
