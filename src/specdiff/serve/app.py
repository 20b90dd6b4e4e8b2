"""The HTTP API: OpenAI's endpoints over a live engine."""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

import specdiff
from specdiff.errors import TargetError, UsageError
from specdiff.noise import row_seed
from specdiff.serve import payloads, playground
from specdiff.serve.live import EngineStoppedError, Job, LiveEngine, QueueFullError
from specdiff.serve.metrics import Metrics
from specdiff.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from specdiff.text.generation import Answer
from specdiff.text.lm import SpeculativeLM
from specdiff.text.options import Options

MAX_BODY = 4 * 2**20  # bytes
OPEN_PATHS = ("/health", "/version")  # without a key


@dataclass(slots=True)
class Choice:
    """One answer of a request."""

    prompt: list[int]
    answer: Answer
    job: Job
    outputs: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    sent: int = 0  # tokens whose log probabilities have been streamed
    rounds: list[dict[str, Any]] = field(default_factory=list)  # records not streamed yet


class Server:
    """The endpoints. Errors become OpenAI's shape in `build`."""

    def __init__(self, lm: SpeculativeLM, engine: LiveEngine, name: str, metrics: Metrics) -> None:
        self.lm = lm
        self.engine = engine
        self.name = name
        self.metrics = metrics
        self.created = int(time.time())

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue each prompt."""
        self._check(body)
        prompts = [self.lm.encode(prompt, raw=True) for prompt in body.prompts()]
        return await self._respond(body, prompts, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._check(body)
        ids = self.lm.render(body.messages, **body.template())
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
            "has_chat_template": bool(getattr(self.lm.tokenizer, "chat_template", None)),
            "sampling_defaults": self.lm.defaults,
        }
        return {"object": "list", "data": [entry]}

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of text or messages."""
        if (body.prompt is None) == (body.messages is None):
            raise UsageError("give either a prompt or messages", param="prompt")
        if body.messages is not None:
            ids = self.lm.render(body.messages)
        else:
            ids = self.lm.raw_ids(body.prompt or "")
        return {"count": len(ids), "max_model_len": self.lm.max_len, "tokens": ids}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, special tokens included."""
        size = self.lm.target.info.vocab_size
        if any(not 0 <= token < size for token in body.tokens):
            raise UsageError(f"tokens must be in [0, {size})", param="tokens")
        return {"prompt": self.lm.tokenizer.decode(body.tokens)}

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
        count = body.n
        if isinstance(body, CompletionRequest):
            count *= len(body.prompts())
        self.engine.check_room(count)

    def _choices(self, body: GenerationRequest, prompts: Sequence[list[int]]) -> list[Choice]:
        options = Options.of(body.options(), self.lm.defaults)
        root = secrets.randbits(63) if options.seed is None else options.seed
        loop = asyncio.get_running_loop()
        choices: list[Choice] = []
        for prompt in prompts:
            for _ in range(body.n):
                outputs: asyncio.Queue[Any] = asyncio.Queue()

                def receive(output: Any, outputs: asyncio.Queue[Any] = outputs) -> None:
                    loop.call_soon_threadsafe(outputs.put_nowait, output)

                engine_request = replace(
                    self.lm.request(prompt, options, row_seed(root, len(choices))),
                    draft_len=body.draft_len,
                    with_drafts=body.include_rounds,
                )
                job = Job(engine_request, receive)
                choices.append(Choice(prompt, self.lm.answer(options), job, outputs))
        return choices

    async def _respond(
        self, body: GenerationRequest, prompts: Sequence[list[int]], request: Request
    ) -> Response:
        choices = self._choices(body, prompts)
        self.engine.submit(*[choice.job for choice in choices])
        chat = isinstance(body, ChatRequest)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.name,
        }
        if body.stream:
            events = self._events(body, choices, head, sum(map(len, prompts)))
            return StreamingResponse(events, media_type="text/event-stream")
        gathered = asyncio.gather(*[self._finish(choice) for choice in choices])
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
            self._cancel(choices)
        generations = [choice.answer.generation for choice in choices]
        return JSONResponse(
            {
                **head,
                "object": "chat.completion" if chat else "text_completion",
                "choices": [self._full(body, i, choice) for i, choice in enumerate(choices)],
                "usage": payloads.usage(sum(map(len, prompts)), generations),
                "metrics": payloads.speculation(generations),
            }
        )

    async def _finish(self, choice: Choice) -> None:
        async for _ in self._texts(choice):
            pass

    async def _texts(self, choice: Choice) -> AsyncIterator[str]:
        """The text of each round. Raises EngineStoppedError or TargetError."""
        began = time.monotonic()
        answer = choice.answer
        while not answer.done:
            output = await choice.outputs.get()
            if isinstance(output, Exception):
                raise output
            if not answer.generation.token_ids:
                self.metrics.first.labels(self.name).observe(time.monotonic() - began)
            before = len(answer.generation.token_ids)
            chunks = list(answer.add(output))
            if choice.job.request.with_drafts:
                count = len(answer.generation.token_ids) - before
                choice.rounds.append(payloads.round_record(output, count, chunks, self._spell))
            yield "".join(chunk.text for chunk in chunks)
        self.engine.cancel(choice.job)  # it may run on, after a stop string
        generation = answer.generation
        self.metrics.total.labels(self.name).observe(time.monotonic() - began)
        self.metrics.ended(len(choice.prompt), generation.stats, generation.finish_reason)
        if generation.error is not None:
            raise TargetError(generation.error)

    def _cancel(self, choices: Sequence[Choice]) -> None:
        for choice in choices:
            if not choice.answer.done:
                self.engine.cancel(choice.job)

    def _spell(self, token: int) -> str:
        return str(self.lm.tokenizer.decode([token]))

    def _full(self, body: GenerationRequest, index: int, choice: Choice) -> dict[str, Any]:
        generation = choice.answer.generation
        entry: dict[str, Any] = {"index": index, "finish_reason": generation.finish_reason}
        entry["logprobs"] = self._logprobs(body, choice)
        if isinstance(body, ChatRequest):
            return {**entry, "message": {"role": "assistant", "content": generation.text}}
        return {**entry, "text": self._echo(body, choice) + generation.text}

    def _echo(self, body: GenerationRequest, choice: Choice) -> str:
        if not isinstance(body, CompletionRequest) or not body.echo:
            return ""
        return str(self.lm.tokenizer.decode(choice.prompt, skip_special_tokens=True))

    def _logprobs(self, body: GenerationRequest, choice: Choice) -> dict[str, Any] | None:
        """Of the tokens that have not been sent yet, if the request wants them."""
        first = choice.sent
        choice.sent = len(choice.answer.generation.token_ids)
        if choice.job.request.params.logprobs is None:
            return None
        if isinstance(body, ChatRequest):
            return payloads.chat_logprobs(choice.answer.generation, first, self._spell)
        return payloads.completion_logprobs(choice.answer.generation, first, self._spell)

    async def _events(
        self, body: GenerationRequest, choices: list[Choice], head: dict[str, Any], prompts: int
    ) -> AsyncIterator[str]:
        """Server-sent events; an error becomes one, then the stream ends."""
        kind = "chat.completion.chunk" if isinstance(body, ChatRequest) else "text_completion"
        head = {**head, "object": kind}
        merged: asyncio.Queue[Any] = asyncio.Queue()
        pumps = [
            asyncio.create_task(self._pump(body, i, choice, merged))
            for i, choice in enumerate(choices)
        ]
        left = len(choices)
        try:
            while left:
                entry = await merged.get()
                if isinstance(entry, Exception):
                    yield _event(payloads.error(str(entry), "server_error", code=500))
                    break
                left -= entry["finish_reason"] is not None
                yield _event({**head, "choices": [entry]})
            else:
                if body.stream_options is not None and body.stream_options.include_usage:
                    generations = [choice.answer.generation for choice in choices]
                    figures = payloads.speculation(generations)
                    usage = payloads.usage(prompts, generations)
                    yield _event({**head, "choices": [], "usage": usage, "metrics": figures})
            yield "data: [DONE]\n\n"
        finally:  # also when the client has gone
            for pump in pumps:
                pump.cancel()
            self._cancel(choices)

    async def _pump(
        self, body: GenerationRequest, index: int, choice: Choice, merged: asyncio.Queue[Any]
    ) -> None:
        chat = isinstance(body, ChatRequest)
        before: dict[str, str] = {"role": "assistant"} if chat else {}
        text = self._echo(body, choice)
        try:
            async for new in self._texts(choice):
                text += new
                reason = choice.answer.generation.finish_reason or None
                if reason == "error" or (not text and reason is None):
                    continue
                entry: dict[str, Any] = {"index": index, "finish_reason": reason}
                entry["logprobs"] = self._logprobs(body, choice)
                if body.include_rounds:
                    entry["rounds"] = choice.rounds
                    choice.rounds = []
                content = {"delta": {**before, "content": text}} if chat else {"text": text}
                merged.put_nowait({**entry, **content})
                before = {}
                text = ""
        except Exception as error:  # the stream reports it to the client
            merged.put_nowait(error)


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def build(
    lm: SpeculativeLM,
    engine: LiveEngine,
    *,
    name: str,
    api_key: str | None = None,
    prefix: str = "specdiff",
    shutdown_timeout: float = 30.0,
) -> FastAPI:
    """The application. It closes `engine` when it shuts down.

    Args:
        name: the model's name in answers.
        api_key: what clients must send as a bearer token, compared in constant time.
        prefix: of the metrics' names.
        shutdown_timeout: seconds that running requests have to end.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, shutdown_timeout)

    app = FastAPI(title="specdiff", version=specdiff.__version__, lifespan=lifespan)
    server = Server(lm, engine, name, Metrics(prefix, name))
    for path, endpoint in (("completions", server.completions), ("chat/completions", server.chat)):
        app.add_api_route(f"/v1/{path}", endpoint, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", server.models)
    app.add_api_route("/tokenize", server.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", server.detokenize, methods=["POST"])
    app.add_api_route("/health", server.health, response_model=None)
    app.add_api_route("/version", server.version)
    app.add_api_route("/metrics", server.metrics_text, response_model=None)
    playground.mount(app)
    for kind in (RequestValidationError, Exception):
        app.add_exception_handler(kind, _failed)
    for failure in (UsageError, QueueFullError, EngineStoppedError, TargetError):
        app.add_exception_handler(failure, _failed)

    async def guard(request: Request, call_next: Any) -> Any:
        size = request.headers.get("content-length", "")
        if request.method == "POST" and not size.isdigit():
            return _answer(411, "a body needs a content-length")
        if size.isdigit() and int(size) > MAX_BODY:
            return _answer(413, f"the body has {size} bytes; at most {MAX_BODY} are read")
        path = request.url.path
        if api_key is not None and path not in OPEN_PATHS and not playground.is_open(path):
            sent = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(sent.encode(), api_key.encode()):
                return _answer(401, "wrong or missing API key; send 'Authorization: Bearer KEY'")
        return await call_next(request)

    app.middleware("http")(guard)
    return app


def _answer(code: int, message: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if code < 500 else "server_error"
    body = payloads.error(message, kind, param=param, code=code)
    return JSONResponse(body, code, headers={"Retry-After": "1"} if code == 503 else None)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, UsageError):
        return _answer(400, str(error), error.param)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _answer(400, f"the body is not valid JSON (at character {first['loc'][-1]})")
        param = ".".join(str(part) for part in first["loc"][1:2]) or None
        return _answer(400, f"{param or 'body'}: {first['msg']}", param)
    if isinstance(error, QueueFullError):
        return _answer(503, str(error))
    return _answer(500, str(error))
