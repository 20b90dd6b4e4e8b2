"""The answers of requests as JSON: whole, or as server-sent events."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from specdiff.serve import error_answers, payloads
from specdiff.serve.choices import Choice, Reader
from specdiff.serve.protocol import ChatRequest, GenerationRequest
from specdiff.serve.tool_calls import ToolCall
from specdiff.text.lm import SpeculativeLM


class AnswerWriter:
    """Writes the answers to one request, `body`. Its choices are `body.n` for each prompt."""

    def __init__(
        self,
        lm: SpeculativeLM,
        reader: Reader,
        name: str,
        body: GenerationRequest,
        choices: Sequence[Choice],
    ) -> None:
        self.lm = lm
        self.reader = reader
        self.body = body
        self.choices = choices
        self.chat = isinstance(body, ChatRequest)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    def full(self) -> dict[str, Any]:
        """The answer, once all choices have ended."""
        return {
            **self.head,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [self._choice(i, choice) for i, choice in enumerate(self.choices)],
            **self._figures(),
        }

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; an error becomes one, then the stream ends."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = {**self.head, "object": kind}
        merged: asyncio.Queue[Any] = asyncio.Queue()
        pumps = [
            asyncio.create_task(self._pump(i, choice, merged))
            for i, choice in enumerate(self.choices)
        ]
        left = len(self.choices)
        try:
            while left:
                entry = await merged.get()
                if isinstance(entry, Exception):
                    kind = "server_error"
                    code = error_answers.status(entry)
                    yield _event(payloads.error(str(entry), kind, code=code))
                    break
                left -= entry["finish_reason"] is not None
                yield _event({**head, "choices": [entry]})
            else:
                options = self.body.stream_options
                if options is not None and options.include_usage:
                    yield _event({**head, "choices": [], **self._figures()})
            yield "data: [DONE]\n\n"
        finally:  # also when the client has gone
            for pump in pumps:
                pump.cancel()
            self.reader.cancel(self.choices)

    async def _pump(self, index: int, choice: Choice, merged: asyncio.Queue[Any]) -> None:
        before: dict[str, str] = {"role": "assistant"} if self.chat else {}
        text = choice.echo
        try:
            async for piece in self.reader.pieces(choice):
                if choice.answer.generation.finish_reason == "error":
                    continue
                content, calls = _split(choice, piece.text, ended=piece.last)
                text += content
                if not text and not calls and not piece.last:
                    continue
                reason = _reason(choice) if piece.last else None
                entry: dict[str, Any] = {"index": index, "finish_reason": reason}
                entry["logprobs"] = self._logprobs(choice, piece.tokens)
                if self.body.include_rounds:
                    entry["rounds"] = choice.rounds
                    choice.rounds = []
                if self.chat:
                    entry["delta"] = {**before, "content": text, **_deltas(choice, calls)}
                else:
                    entry["text"] = text
                merged.put_nowait(entry)
                before = {}
                text = ""
        except Exception as error:  # the stream reports it to the client
            merged.put_nowait(error)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        generation = choice.answer.generation
        text, calls = _split(choice, generation.text, ended=True)
        entry: dict[str, Any] = {"index": index, "finish_reason": _reason(choice)}
        entry["logprobs"] = self._logprobs(choice, len(generation.token_ids))
        if not self.chat:
            return {**entry, "text": choice.echo + text}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [call.entry() for call in calls]
        return {**entry, "message": message}

    def _figures(self) -> dict[str, Any]:
        """Usage, and the figures of speculation."""
        generations = [choice.answer.generation for choice in self.choices]
        firsts = self.choices[:: self.body.n]  # of each prompt
        return {
            "usage": payloads.usage(
                sum(len(choice.prompt) for choice in firsts),
                sum(choice.answer.generation.cached_tokens for choice in firsts),
                generations,
            ),
            "metrics": payloads.speculation(generations),
        }

    def _logprobs(self, choice: Choice, end: int) -> dict[str, Any] | None:
        """Of the tokens up to `end` that have none yet, if the request wants them."""
        first = choice.sent
        choice.sent = end
        if choice.job.request.params.logprobs is None:
            return None
        generation = choice.answer.generation
        spell = self.reader.spell
        if self.chat:
            return payloads.chat_logprobs(generation, first, end, spell)
        entries = payloads.completion_logprobs(generation, first, end, spell, len(choice.echo))
        if choice.score is None:
            return entries
        decode = self.lm.tokenizer.decode  # special tokens have no text in the echo
        lengths = [len(decode([token], skip_special_tokens=True)) for token in choice.prompt]
        echo = payloads.prompt_logprobs(choice.prompt, choice.score, spell, lengths)
        choice.score = None
        return {name: values + entries[name] for name, values in echo.items()}


def _split(choice: Choice, text: str, *, ended: bool) -> tuple[str, list[ToolCall]]:
    """The content that new text holds or completes, and the calls of tools."""
    if choice.calls is None:
        return text, []
    content, calls = choice.calls.add(text)
    return content + choice.calls.finish() if ended else content, calls


def _deltas(choice: Choice, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """The part of a chunk that holds new calls."""
    if not calls or choice.calls is None:
        return {}
    first = choice.calls.count - len(calls)
    return {"tool_calls": [{"index": first + i, **call.entry()} for i, call in enumerate(calls)]}


def _reason(choice: Choice) -> str | None:
    """Why an answer has ended; None while it runs."""
    reason = choice.answer.generation.finish_reason or None
    called = choice.calls is not None and choice.calls.count > 0
    return "tool_calls" if called and reason == "stop" else reason


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"
