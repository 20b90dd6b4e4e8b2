"""Tool calls: read from the text of an answer, enforced by a grammar, and given to templates.

One format is read, that of Hermes and Qwen:
<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>. Other text stays text.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdiff.errors import UsageError

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# the longest end of a text that may belong to a call: white space, and the beginning of a tag
PARTIAL = re.compile(r"\s*(?:" + "|".join(OPEN[:n] for n in range(len(OPEN) - 1, -1, -1)) + r")\Z")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function. `arguments` is JSON text of an object."""

    name: str
    arguments: str

    def entry(self) -> dict[str, Any]:
        """As it stands in a message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": function,
        }


class ToolCallReader:
    """Splits the text of an answer into content and calls, as it comes.

    A call is reported when it is complete. White space next to calls is dropped; what is no call of
    one of `names`, with an object as arguments, stays content.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        self.count = 0  # of calls
        self._buffer = ""

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """The content and the calls that `text` completes."""
        self._buffer += text
        content = ""
        calls: list[ToolCall] = []
        while OPEN in self._buffer:
            before, _, after = self._buffer.partition(OPEN)
            inside, end, after = after.partition(CLOSE)
            if not end:  # the call is not complete; the space before it waits too
                head = before.rstrip()
                self._buffer = self._buffer[len(head) :]
                return content + head, calls
            call = self._call(inside)
            if call is None:
                content += before + OPEN + inside + CLOSE
            else:
                content += before.rstrip()
                calls.append(call)
                self.count += 1
            self._buffer = after
        match = PARTIAL.search(self._buffer)
        size = len(self._buffer) if match is None else match.start()
        content += self._buffer[:size]
        self._buffer = self._buffer[size:]
        return content, calls

    def finish(self) -> str:
        """The rest of the content, once the answer has ended."""
        rest = self._buffer
        self._buffer = ""
        return "" if self.count and not rest.strip() else rest

    def _call(self, text: str) -> ToolCall | None:
        try:
            value = json.loads(text)
            if not isinstance(value, dict) or not isinstance(value.get("arguments", {}), dict):
                return None
            arguments = json.dumps(value.get("arguments", {}), ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):
            return None
        name = value.get("name")
        return ToolCall(name, arguments) if name in self.names else None


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions of a request, and what it wants of them.

    choice: "none", "auto", "required" or the name of one.
    parallel: whether an answer may hold several calls.
    """

    schemas: Mapping[str, Any]
    choice: str = "none"
    parallel: bool = True

    @classmethod
    def of(cls, tools: Sequence[Any] | None, choice: Any, parallel: bool) -> "Tools":
        """Raises UsageError for a malformed tool, and a choice that names none."""
        schemas: dict[str, Any] = {}
        for tool in tools or ():
            function = tool.get("function") if isinstance(tool, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(function, Mapping) or tool.get("type") != "function":
                raise UsageError(
                    'each of tools must be {"type": "function", "function": {...}}', param="tools"
                )
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise UsageError(
                    "a function's name has 1 to 64 letters, digits, dots, dashes or underscores",
                    param="tools",
                )
            schema = function.get("parameters")
            schemas[name] = {"type": "object"} if schema is None else schema
            if not isinstance(schemas[name], Mapping):
                raise UsageError(f"the parameters of {name} must be a JSON schema", param="tools")
        return cls(schemas, cls._choice(choice, schemas), parallel)

    @staticmethod
    def _choice(choice: Any, schemas: Mapping[str, Any]) -> str:
        if choice is None:
            return "auto" if schemas else "none"
        if choice in ("none", "auto"):
            return str(choice) if schemas else "none"
        if choice == "required" and schemas:
            return "required"
        function = choice.get("function") if isinstance(choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name in schemas:
            return name
        raise UsageError(
            'tool_choice must be "none", "auto", "required" (with tools) or '
            '{"type": "function", "function": {"name": NAME}} with the name of one of tools',
            param="tool_choice",
        )

    def reader(self) -> ToolCallReader | None:
        """For one answer; None if calls are not read."""
        return None if self.choice == "none" else ToolCallReader([*self.schemas])

    def grammar(self) -> str | None:
        """The grammar (Lark) of an answer that must be calls; None if it need not be."""
        if self.choice in ("none", "auto"):
            return None
        names = [*self.schemas] if self.choice == "required" else [self.choice]
        several = self.choice == "required" and self.parallel
        lines = ['start: call ("\\n" call)*' if several else "start: call"]
        lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(names))))
        for i, name in enumerate(names):
            head = json.dumps(f'{OPEN}\n{{"name": "{name}", "arguments": ')
            tail = json.dumps(f"}}\n{CLOSE}")
            lines.append(f"call_{i}: {head} arguments_{i} {tail}")
            lines.append(f"arguments_{i}: %json {json.dumps(self._object(name))}")
        return "\n".join(lines)

    def _object(self, name: str) -> dict[str, Any]:
        """The schema of a function's arguments; they are an object in any case."""
        schema = dict(self.schemas[name])
        return (
            schema if {"$ref", "anyOf", "allOf"} & schema.keys() else {"type": "object", **schema}
        )


def prepared(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages as templates expect them: the arguments of calls as objects, not as JSON text.

    Raises UsageError for arguments that are no JSON object.
    """
    return [
        {**message, "tool_calls": [_prepared(call) for call in _calls(message)]}
        if message.get("tool_calls")
        else {name: value for name, value in message.items() if name != "tool_calls"}
        for message in messages
    ]


def _calls(message: Mapping[str, Any]) -> list[Any]:
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise UsageError("tool_calls of a message must be a list", param="messages")
    return calls


def _prepared(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError(
            'each of tool_calls must be {"function": {"name": ..., "arguments": ...}}',
            param="messages",
        )
    arguments = function.get("arguments", "{}")
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(
            f"the arguments of the call of {function['name']} must be a JSON object",
            param="messages",
        )
    return {**call, "function": {**function, "arguments": value}}
