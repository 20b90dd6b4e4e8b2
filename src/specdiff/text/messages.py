"""Chat messages: conversations encoded as token ids through a model's chat template.

Message content is text: a control token spelled in a message is encoded as ordinary text, so the
content of a message cannot begin another turn.
"""

import json
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from specdiff.errors import UsageError
from specdiff.text.chat_template import Renderer, TemplateError
from specdiff.unicode import valid

Message = Mapping[str, Any]
# First character of a private plane; these stand for control tokens while a template runs.
PRIVATE = 0xF0000
RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversations",
        "documents",
        "messages",
        "return_assistant_tokens_mask",
        "tools",
    }
)


def template_variables(
    tools: Any = None,
    documents: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The template variables other than the messages. Raises UsageError for invalid ones."""
    variables = dict(_mapping("chat_template_kwargs", chat_template_kwargs))
    reserved = sorted(RESERVED & variables.keys())
    if reserved:
        raise UsageError(
            f"chat_template_kwargs may not hold {reserved[0]!r}, which has an argument of its own",
            param="chat_template_kwargs",
        )
    if tools is not None:
        variables["tools"] = [_tool(tool) for tool in _sequence("tools", tools)]
    if documents is not None:
        variables["documents"] = [
            dict(_mapping("documents", entry, "each of documents"))
            for entry in _sequence("documents", documents)
        ]
    return variables


def _mapping(param: str, value: Any, label: str | None = None) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise UsageError(f"{label or param} must be a mapping, not {value!r}", param=param)
    return value or {}


def _sequence(param: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise UsageError(f"{param} must be a list, not {value!r}", param=param)
    return value


def _tool(tool: Any) -> dict[str, Any]:
    """The JSON schema of a tool given as a schema or as a function."""
    if callable(tool):
        from transformers.utils import get_json_schema

        try:
            return dict(get_json_schema(tool))
        except Exception as error:  # it parses an arbitrary docstring
            raise UsageError(
                f"the tool {tool!r} cannot be described: {error}", param="tools"
            ) from error
    return dict(_mapping("tools", tool, "each of tools"))


def checked(messages: Any) -> list[dict[str, Any]]:
    """The messages, with valid text and with text parts joined.

    Raises UsageError naming the message and what is wrong with it.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise _invalid('messages must be a list of {"role": ..., "content": ...}')
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise _invalid(
            f'messages must be a list of {{"role": ..., "content": ...}}; '
            f"message {index} is {message!r}"
        )
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(_part(index, part) for part in content)
    if content is None and not message.get("tool_calls"):
        raise _invalid(f"message {index} (role {message['role']!r}) has no content; give a string")
    if content is not None and not isinstance(content, str):
        raise _invalid(
            f"the content of message {index} (role {message['role']!r}) must be a string, "
            f"not {content!r}"
        )
    clean: dict[str, Any] = _changed({**message, "content": content}, valid)
    return clean


def _part(index: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise _invalid(f"message {index} has a part of type {kind!r}; only text parts can be read")
    if not isinstance(part.get("text"), str):
        raise _invalid(f"message {index} has a text part without text: {part!r}")
    return str(part["text"])


def _invalid(text: str) -> UsageError:
    return UsageError(text, param="messages")


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to every string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(name, change): _changed(entry, change) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(entry, change) for entry in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in (*value.keys(), *value.values()):
            yield from _strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _strings(entry)


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._renderer = Renderer()
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(
            {*tokenizer.all_special_tokens, *(t.content for t in added.values() if t.special)}
        )
        self._added = _any_of({*self._special, *(t.content for t in added.values())})
        self._guard: _Guard | None = None

    def encode(
        self, messages: Any, *, answered: bool = False, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The token ids of a conversation, up to where the answer begins.

        A final assistant message is continued.

        Args:
            answered: the conversation is complete: the ids end with its last message.
            variables: template variables, from `template_variables`. Tools and documents are
                encoded as text, as messages are.

        Raises UsageError for invalid messages, and for those that the template refuses.
        """
        conversation = checked(messages)
        resume = not answered and bool(conversation) and conversation[-1]["role"] == "assistant"
        prompt = not answered and not resume
        variables = _changed(variables or {}, valid)
        data = {name: variables[name] for name in ("tools", "documents") if name in variables}
        spelled = self.spelled([conversation, data])
        if not spelled:
            text = self._render(conversation, prompt, resume, variables)
            return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        guard = self._guarded(spelled)
        template = self.tokenizer.get_chat_template()
        used = set("".join(_strings([conversation, variables, template])))
        unused = (chr(code) for code in range(PRIVATE, PRIVATE + 0xFFFE) if chr(code) not in used)
        places = dict(zip(sorted(spelled), unused, strict=False))
        hidden = _any_of(spelled)

        def hide(text: str) -> str:
            return hidden.sub(lambda match: places[match[0]], text)

        text = self._render(
            _changed(conversation, hide), prompt, resume, {**variables, **_changed(data, hide)}
        )
        return guard.encode(text, {place: name for name, place in places.items()})

    def spelled(self, value: Any) -> frozenset[str]:
        """The control tokens spelled in `value`: special tokens, and `markers`."""
        names = frozenset(name for text in _strings(value) for name in self._added.findall(text))
        return names if names <= self._special else names & (self._special | self.markers)

    @cached_property
    def markers(self) -> frozenset[str]:
        """The added tokens that the template writes around turns.

        Some tokenizers do not mark them as special.
        """
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        written: set[str] = set()
        for probe in (turns, turns[:1]):  # some templates refuse one or the other
            try:
                written.update(self._added.findall(self._render(probe, True, False, {})))
            except UsageError:
                continue
        return frozenset(written)

    def warn_of_control_tokens(self, prompt: str) -> None:
        """Warn if a prompt looks as if it were already rendered with the template."""
        spelled = self.spelled(prompt)
        control = spelled & self.markers if spelled else spelled
        if control:
            warnings.warn(
                f"the prompt spells the control token {min(control)!r}, which is read as ordinary "
                "text; give a prompt that is rendered already with raw=True",
                stacklevel=3,
            )

    def _guarded(self, spelled: frozenset[str]) -> "_Guard":
        if not self.tokenizer.is_fast:
            name = min(spelled)
            raise _invalid(
                f"a message spells the control token {name!r}, "
                "which this tokenizer cannot encode as text; take it out"
            )
        if self._guard is None:
            self._guard = _Guard(self.tokenizer, self._special | self.markers)
        return self._guard

    def _render(
        self, messages: Sequence[Message], prompt: bool, resume: bool, variables: Mapping[str, Any]
    ) -> str:
        try:
            template = self.tokenizer.get_chat_template(tools=variables.get("tools"))
            tokens = self.tokenizer.special_tokens_map
            return self._renderer.render(
                template, messages, prompt=prompt, tokens=tokens, resume=resume, variables=variables
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise _invalid(f"the model's chat template refuses these messages ({error})") from error


def _any_of(names: set[str] | frozenset[str]) -> re.Pattern[str]:
    """A pattern for any of the strings, the longest first; it matches nothing if there are none."""
    ordered = sorted((name for name in names if name), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


class _Guard:
    """A copy of the tokenizer that encodes spelled control tokens as text.

    Each control token has a twin with an unguessable spelling, which is encoded as the token. Twins
    split the text where the tokens would, so the text between them is encoded unchanged.
    """

    def __init__(self, tokenizer: Any, control: frozenset[str]) -> None:
        from tokenizers import AddedToken, Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["special"] or token["content"] in control
        self.backend = Tokenizer.from_str(json.dumps(state))
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        secret = secrets.token_hex(8)
        self.twins: dict[str, str] = {}
        self.ids: dict[int, int] = {}
        for token in state["added_tokens"]:
            if token["special"]:
                twin = f"[{secret}-{token['id']}]"
                flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip")}
                self.backend.add_tokens(
                    [AddedToken(twin, normalized=False, special=False, **flags)]
                )
                self.twins[token["content"]] = twin
                self.ids[int(self.backend.token_to_id(twin) or 0)] = token["id"]
        self.names = _any_of(frozenset(self.twins))

    def encode(self, text: str, places: Mapping[str, str]) -> list[int]:
        """Encode `text`, in which each character of `places` stands for a string of plain text."""
        text = self.names.sub(lambda match: self.twins[match[0]], text)
        text = text.translate({ord(place): name for place, name in places.items()})
        return [self.ids.get(i, i) for i in self.backend.encode(text, add_special_tokens=False).ids]
