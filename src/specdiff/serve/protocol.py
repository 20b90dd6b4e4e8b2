"""The fields of requests, as pydantic models, and their translation into the library's options.

Unknown fields are ignored, as vLLM does; known ones that have no meaning here are refused by name.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from specdiff.errors import UsageError
from specdiff.serve.tool_calls import Tools

MOST_STOPS = 4
MOST_CHOICES = 16
# known to other servers and not kept here: refused unless the value is one that asks for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "bad_words": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": (),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "regex": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "use_beam_search": (False,),
}

# fields of structured_outputs (also after guided_), and the library's options
STRUCTURES = {
    "json": "json_schema",
    "regex": "regex",
    "grammar": "grammar",
    "choice": "choice",
}


class StreamOptions(BaseModel):
    """What a stream holds besides text: usage at its end, and a record of each round."""

    include_usage: bool = False
    include_rounds: bool = False


class GenerationRequest(BaseModel):
    """The fields that both endpoints share; None leaves the server's default."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    draft_len: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    def check_supported(self) -> None:
        """Raise UsageError naming the first field that this server cannot keep."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                raise UsageError(f"{name} is not supported by this server", param=name)
        if isinstance(self.stop, list) and len(self.stop) > MOST_STOPS:
            raise UsageError(
                f"stop may hold at most {MOST_STOPS} strings, not {len(self.stop)}", param="stop"
            )
        if self.stream_options is not None and not self.stream:
            raise UsageError("stream_options need stream=true", param="stream_options")

    @property
    def include_rounds(self) -> bool:
        """Whether the stream holds a record of each round."""
        return self.stream_options is not None and self.stream_options.include_rounds

    def length(self) -> int | None:
        """The most tokens of the answer that the request names."""
        return self.max_tokens

    def check_length(self, prompt_tokens: int | None, max_len: int) -> None:
        """Raise UsageError if the tokens that a request names do not fit; a default is cut.

        prompt_tokens: None if they are not known yet.
        """
        limit = self.length()
        if limit is not None and (prompt_tokens or 1) + limit > max_len:
            prompt = (
                "any prompt" if prompt_tokens is None else f"a prompt of {prompt_tokens} tokens"
            )
            raise UsageError(
                f"{prompt} and max_tokens={limit} exceed the {max_len} tokens of this server's "
                "context; shorten the prompt or lower max_tokens",
                param="max_tokens",
            )

    def options(self) -> dict[str, Any]:
        """The library's options; None leaves the default."""
        top_k = self.top_k
        return {
            "max_tokens": self.max_tokens,
            "stop": self.stop or None,
            "stop_token_ids": self.stop_token_ids,
            "include_stop": self.include_stop_str_in_output or None,
            "ignore_eos": self.ignore_eos or None,
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if top_k == -1 else top_k,  # vLLM's way to say off
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids,
            **self._structure(),
        }

    def _structure(self) -> dict[str, Any]:
        """The options of structured output. Raises UsageError for an unknown form of it."""
        extra = self.model_extra or {}
        options: dict[str, Any] = {}
        for name, option in STRUCTURES.items():
            for field, value in (
                (name, (self.structured_outputs or {}).get(name)),
                (f"guided_{name}", extra.get(f"guided_{name}")),
            ):
                if value is not None:
                    if option in options:
                        raise UsageError(f"{field} is one structure too many", param=field)
                    options[option] = value
        unknown = set(self.structured_outputs or {}) - {*STRUCTURES}
        if unknown:
            raise UsageError(
                f"structured_outputs take {', '.join(STRUCTURES)}, not {sorted(unknown)[0]!r}",
                param="structured_outputs",
            )
        schema = self._response_schema()
        if schema is not None and options:
            raise UsageError("give one of response_format and others", param="response_format")
        return options if schema is None else {"json_schema": schema}

    def _response_schema(self) -> Any:
        """The JSON schema that `response_format` asks for; None for text."""
        if self.response_format is None or self.response_format.get("type") == "text":
            return None
        kind = self.response_format.get("type")
        if kind == "json_object":
            return {"type": "object"}
        holder = self.response_format.get("json_schema")
        if kind != "json_schema" or not isinstance(holder, dict) or "schema" not in holder:
            raise UsageError(
                "response_format must have type text, json_object, or json_schema with "
                "json_schema.schema",
                param="response_format",
            )
        return holder["schema"]


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions. A prompt is text or token ids; a list holds several."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    @property
    def only_echo(self) -> bool:
        """Whether nothing is generated: the answer is the prompt, to get its log probabilities."""
        return self.echo and self.max_tokens == 0

    def options(self) -> dict[str, Any]:
        """The library's options; None leaves the default."""
        limit = 16 if self.max_tokens is None else self.max_tokens  # the API's default
        most = 1 if self.only_echo else limit
        return {**super().options(), "max_tokens": most, "logprobs": self.logprobs}


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions. Tools, documents and variables reach the template.

    Calls of `tools` in the answer are read unless `tool_choice` is "none"; "required" and the name
    of a function enforce them.
    """

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check_supported(self) -> None:
        """Raise UsageError naming the first field that this server cannot keep."""
        super().check_supported()
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs=true", param="top_logprobs")
        if self.tool_use().grammar() is not None and self._structure():
            raise UsageError(
                "an answer that must call a tool has no other structure", param="tool_choice"
            )

    def tool_use(self) -> Tools:
        """The tools, checked. Raises UsageError."""
        return Tools.of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def options(self) -> dict[str, Any]:
        """The library's options; None leaves the default."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        options = {**super().options(), "max_tokens": self.length(), "logprobs": logprobs}
        grammar = self.tool_use().grammar()
        return options if grammar is None else {**options, "grammar": grammar}

    def length(self) -> int | None:
        """The most tokens of the answer that the request names."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def template(self) -> dict[str, Any]:
        """The options of the chat template."""
        return {
            "tools": self.tools,
            "documents": self.documents,
            "chat_template_kwargs": self.chat_template_kwargs,
        }


class TokenizeRequest(BaseModel):
    """The body of /tokenize: text, or messages for the chat template."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


class DetokenizeRequest(BaseModel):
    """The body of /detokenize."""

    tokens: list[int]
