"""The HTTP API: OpenAI's endpoints over a live engine."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

import specdiff
from specdiff import engine
from specdiff.errors import UsageError
from specdiff.noise import row_seed
from specdiff.serve import error_answers, playground
from specdiff.serve.answers import AnswerWriter
from specdiff.serve.choices import Choice, Limits, Reader
from specdiff.serve.guard import Guard
from specdiff.serve.live import Job, LiveEngine
from specdiff.serve.metrics import Metrics
from specdiff.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from specdiff.serve.tool_calls import prepared
from specdiff.text.lm import SpeculativeLM
from specdiff.text.options import Options


class Server:
    """The endpoints. Errors become answers in `error_answers`.

    Texts are tokenized and templates rendered in threads, so that a long one stalls no stream.
    """

    def __init__(
        self,
        lm: SpeculativeLM,
        engine: LiveEngine,
        name: str,
        metrics: Metrics,
        limits: Limits,
        stream_chunk: int | None,
    ) -> None:
        self.lm = lm
        self.engine = engine
        self.name = name
        self.metrics = metrics
        self.reader = Reader(engine, metrics, limits, self._spell, stream_chunk)
        self.created = int(time.time())
        words = lm.tokenizer.get_vocab() if lm.tokenizer is not None else ()
        self.longest_prompt = lm.max_len * max(map(len, words), default=1)  # characters

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue each prompt."""
        self._check(body)
        prompts = await asyncio.to_thread(self._encoded, body)
        return await self._respond(body, prompts, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._check(body)
        self._check_size(sum(map(_characters, body.messages)), "messages")
        messages = prepared(body.messages)
        ids = await asyncio.to_thread(self.lm.render, messages, **body.template())
        return await self._respond(body, [self.lm.encode(ids)], request)

    async def models(self) -> dict[str, Any]:
        """The one model."""
        entry = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "specdiff",
            "max_model_len": self.lm.max_len,
            "max_draft_len": self.engine.max_draft_len,
            "stream_chunk": self.reader.stream_chunk,
            "has_chat_template": bool(getattr(self.lm.tokenizer, "chat_template", None)),
            "sampling_defaults": self.lm.defaults,
        }
        return {"object": "list", "data": [entry]}

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of text or messages."""
        if (body.prompt is None) == (body.messages is None):
            raise UsageError("give either a prompt or messages", param="prompt")
        if body.messages is not None:
            ids = await asyncio.to_thread(self.lm.render, prepared(body.messages))
        else:
            ids = await asyncio.to_thread(self.lm.raw_ids, body.prompt or "")
        return {"count": len(ids), "max_model_len": self.lm.max_len, "tokens": ids}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, special tokens included."""
        size = self.lm.target.info.vocab_size
        if any(not 0 <= token < size for token in body.tokens):
            raise UsageError(f"tokens must be in [0, {size})", param="tokens")
        return {"prompt": await asyncio.to_thread(self.lm.tokenizer.decode, body.tokens)}

    async def health(self) -> Response:
        """200 while requests are taken, 503 afterwards."""
        return Response(status_code=200 if self.engine.healthy else 503)

    async def version(self) -> dict[str, str]:
        """The version of specdiff."""
        return {"version": specdiff.__version__}

    async def metrics_text(self) -> Response:
        """Prometheus metrics."""
        return Response(self.metrics.text(self.engine), media_type="text/plain; version=0.0.4")

    def _check(self, body: GenerationRequest) -> None:
        """Refuse what cannot be served, before anything is tokenized."""
        body.check_supported()
        if body.include_rounds and self.reader.stream_chunk is not None:
            raise UsageError(
                "include_rounds is off on this server: --stream-chunk hides what rounds accept",
                param="stream_options",
            )
        body.check_length(None, self.lm.max_len)
        count = body.n
        if isinstance(body, CompletionRequest):
            count *= len(body.prompts())
            if not count:
                raise UsageError("prompt holds no prompts; give at least one", param="prompt")
        most = self.engine.max_rows + self.engine.max_queue
        if count > most:
            raise UsageError(
                f"{count} answers in one request; this server takes at most {most}", param="n"
            )
        self.engine.check_room(count)

    def _check_size(self, count: int, field: str) -> None:
        """Refuse a text that is too long in whatever tokens."""
        if count > self.longest_prompt:
            raise UsageError(
                f"{field}: {count} characters are more than the {self.lm.max_len} tokens of this "
                "server's context; shorten the text",
                param=field,
            )

    def _encoded(self, body: CompletionRequest) -> list[list[int]]:
        """The token ids of each prompt. Raises UsageError for one that cannot fit."""
        prompts = body.prompts()
        for prompt in prompts:
            self._check_size(len(prompt) if isinstance(prompt, str) else 0, "prompt")
        return [self.lm.encode(prompt, raw=True) for prompt in prompts]

    def _choices(
        self,
        body: GenerationRequest,
        prompts: Sequence[list[int]],
        loop: asyncio.AbstractEventLoop,
    ) -> list[Choice]:
        """The answers to generate. Their outputs come to `loop`."""
        options = Options.of(body.options(), self.lm.defaults)
        body.check_length(max(map(len, prompts)), self.lm.max_len)
        root = secrets.randbits(63) if options.seed is None else options.seed
        choices: list[Choice] = []
        if options.seed is not None and options.sampling.temperature and not self.engine.seeded:
            raise UsageError(
                "this server's drafter remembers earlier requests, so a seed gives no reproducible "
                "text above temperature 0; leave it out",
                param="seed",
            )
        echo = isinstance(body, CompletionRequest) and body.echo
        generate = not (isinstance(body, CompletionRequest) and body.only_echo)
        scores = options.sampling.logprobs if echo else None
        for prompt in prompts:
            request = self._request(body, prompt, options)
            text = self.lm.tokenizer.decode(prompt, skip_special_tokens=True) if echo else ""
            for _ in range(body.n):
                outputs: asyncio.Queue[Any] = asyncio.Queue()

                def receive(output: Any, outputs: asyncio.Queue[Any] = outputs) -> None:
                    loop.call_soon_threadsafe(outputs.put_nowait, output)

                engine_request = replace(
                    request,
                    seed=row_seed(root, len(choices)),
                    draft_len=body.draft_len,
                    with_drafts=body.include_rounds,
                )
                job = Job(engine_request, receive, scores, generate)
                choice = Choice(prompt, self.lm.answer(options), job, outputs, str(text))
                choice.calls = body.tool_use().reader() if isinstance(body, ChatRequest) else None
                choices.append(choice)
        return choices

    def _request(
        self, body: GenerationRequest, prompt: list[int], options: Options
    ) -> engine.Request:
        try:
            return self.lm.request(prompt, options, 0)
        except UsageError as error:
            if isinstance(body, ChatRequest) and body.tool_use().grammar() is not None:
                raise UsageError(f"tools: {error}", param="tools") from None
            raise

    async def _respond(
        self, body: GenerationRequest, prompts: Sequence[list[int]], request: Request
    ) -> Response:
        loop = asyncio.get_running_loop()
        # in a thread: a grammar takes a while to compile
        choices = await asyncio.to_thread(self._choices, body, prompts, loop)
        self.engine.submit(*[choice.job for choice in choices])
        request.scope["arrived"]()
        writer = AnswerWriter(self.lm, self.reader, self.name, body, choices)
        if body.stream:
            return StreamingResponse(writer.events(), media_type="text/event-stream")
        gathered = asyncio.gather(*[self.reader.finish(choice) for choice in choices])
        hangup = asyncio.create_task(_disconnected(request))
        try:
            waiting: set[asyncio.Future[Any]] = {gathered, hangup}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not gathered.done():
                return Response(status_code=499)  # the client has hung up
            gathered.result()
        finally:
            hangup.cancel()
            gathered.cancel()
            self.reader.cancel(choices)
        return JSONResponse(writer.full())

    def _spell(self, token: int) -> str:
        return str(self.lm.tokenizer.decode([token]))


def _characters(message: dict[str, Any]) -> int:
    """The length of a message's text, be it a string or a list of parts."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return sum(len(text) for text in texts if isinstance(text, str))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build(
    lm: SpeculativeLM,
    engine: LiveEngine,
    *,
    name: str,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
    prefix: str = "specdiff",
    limits: Limits | None = None,
    stream_chunk: int | None = None,
) -> FastAPI:
    """The application. It closes `engine` when it shuts down.

    Args:
        name: the model's name in answers.
        api_key: what clients must send as a bearer token, compared in constant time.
        hosts: the names in the Host header that are answered (None: any).
        prefix: of the metrics' names.
        limits: how long requests may take (None: the defaults).
        stream_chunk: tokens of each event of a stream (None: those of a round).
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, limits.shutdown)

    # the pages of documentation that FastAPI has load scripts of other sites
    app = FastAPI(
        title="specdiff",
        version=specdiff.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    server = Server(lm, engine, name, Metrics(prefix, name), limits, stream_chunk)
    for path, endpoint in (("completions", server.completions), ("chat/completions", server.chat)):
        app.add_api_route(f"/v1/{path}", endpoint, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", server.models)
    app.add_api_route("/tokenize", server.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", server.detokenize, methods=["POST"])
    app.add_api_route("/health", server.health, response_model=None)
    app.add_api_route("/version", server.version)
    app.add_api_route("/metrics", server.metrics_text, response_model=None)
    playground.mount(app)
    error_answers.register(app)
    app.add_middleware(Guard, engine=engine, api_key=api_key, hosts=hosts)
    return app
