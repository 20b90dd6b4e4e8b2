"""Corpora of the target's own text: prompts in, rows out, through the engine.

Every row is a function of (target, settings, key): its temperature and all its randomness depend
on its key alone, and `match` makes the text the same with any drafter and in any batch. An
interrupted run may therefore repeat the work that it lost.
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from jaxtyping import Int
from torch import Tensor

from specdiff import catalog, engine
from specdiff.controller import Controller
from specdiff.data.ledger import Ledger
from specdiff.data.shards import Row
from specdiff.data.sources import Opening, Source, SourcePrompt
from specdiff.engine import EngineStep, Request
from specdiff.errors import CorpusError, UsageError
from specdiff.models.packed import formats
from specdiff.noise import row_seed
from specdiff.targets.causal import CausalTarget
from specdiff.text.lm import SpeculativeLM
from specdiff.types import SamplingParams
from specdiff.verify import match
from specdiff.weights import fingerprint

FLUSH_SECONDS = 60.0
MAX_CONSECUTIVE_DROPS = 1000  # then no new texts are to be expected
QUESTION_UNENDED = "question-unended"
QUESTION_EMPTY = "question-empty"
TARGET_FAILED = "target-failed"  # its logits were NaN or infinite


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """Seed, answer length and mixture of temperatures. Raises UsageError naming the bad value."""

    seed: int = 0
    max_tokens: int = 256
    temperatures: tuple[float, ...] = (1.0, 0.7, 0.0)
    shares: tuple[float, ...] = (0.4, 0.2, 0.4)

    def __post_init__(self) -> None:
        if len(self.temperatures) != len(self.shares) or not self.shares:
            raise UsageError(
                f"{len(self.temperatures)} temperatures need as many shares, not {len(self.shares)}"
            )
        total = sum(self.shares)
        if any(not s >= 0 for s in self.shares) or not math.isclose(total, 1, abs_tol=1e-6):
            shares = ", ".join(f"{s:g}" for s in self.shares)
            raise UsageError(
                f"shares must be at least 0 and sum to 1, not {shares} (sum {total:g})"
            )
        for temperature in self.temperatures:
            SamplingParams(max_tokens=self.max_tokens, temperature=temperature)  # checks the values

    def temperature(self, key: int) -> float:
        """The temperature of this key's row."""
        u = row_seed(row_seed(self.seed, key), 1) / 2**64
        for temperature, share in zip(self.temperatures, self.shares, strict=True):
            u -= share
            if u < 0:
                return temperature
        # the rounding error of the shares goes to the largest
        return max(zip(self.shares, self.temperatures, strict=True))[1]


def about(lm: SpeculativeLM, source: Source, settings: CorpusSettings) -> dict[str, Any]:
    """Everything a row depends on besides its key."""
    spec = lm.target.info.name
    folder = Path(spec).expanduser()
    packed = formats(lm.target.model) if isinstance(lm.target, CausalTarget) else ""
    return identity(spec) | {
        **({"quantized": packed} if packed else {}),
        "target": str(folder.resolve()) if folder.is_dir() else spec,
        "dtype": str(lm.target.info.dtype).removeprefix("torch."),
        "source": source.about,
        **asdict(settings),
    }


def identity(spec: str) -> dict[str, str]:
    """A target by name and by content. `target_sha256` identifies it in older manifests."""
    folder = model_files(spec)
    return {
        "target": spec,
        "target_sha256": first_megabytes(folder),
        "target_weights": fingerprint(folder),
    }


def model_files(spec: str) -> Path:
    """The local folder that holds a model's config.json and safetensors."""
    from transformers.utils import cached_file

    folder = Path(catalog.model_folder(spec))
    if folder.is_dir():
        return folder
    return Path(str(cached_file(str(folder), "config.json"))).parent


def first_megabytes(folder: Path) -> str:
    """SHA-256 over config.json and the name, size and first megabyte of each weight file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(1 << 20))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class GenerationStep:
    """Tokens that one round generated; `unsettled` tokens wait for unfinished rows."""

    tokens: int
    unsettled: int = 0


def generate(
    lm: SpeculativeLM,
    source: Source,
    ledger: Ledger,
    settings: CorpusSettings,
    *,
    tokens: int,
    rows: int,
    on_prompt: Callable[[int], None] = lambda prompts: None,
) -> Iterator[GenerationStep]:
    """Write rows until the corpus has `tokens` tokens or the source is exhausted.

    Rows are settled in the order of their keys, and the corpus ends with the first key that
    reaches the goal: the same seed gives the same rows, whatever the batch size `rows`. The
    generator may be closed at any time: the writer's next flush stores the settled rows.

    `on_prompt` is called for each prompt with their number so far; the target then reads them.

    Raises CorpusError if only duplicates or unusable prompts come.
    """
    feed = _Feed(lm, source, ledger, settings, tokens, on_prompt)
    last_flush = time.monotonic()
    while ledger.writer.tokens < tokens and not feed.exhausted:
        with closing(serve(lm, iter(feed), slots(lm, source, settings), rows)) as steps:
            for step in steps:
                generated = int(step.round.emitted.sum())
                feed.settle(step, generated)
                if time.monotonic() - last_flush > FLUSH_SECONDS:
                    ledger.writer.flush()
                    last_flush = time.monotonic()
                yield GenerationStep(generated, feed.unsettled)
                if ledger.writer.tokens >= tokens:
                    return


def serve(
    lm: SpeculativeLM, requests: Iterator[Request | None], room: int, rows: int
) -> Generator[EngineStep, None, None]:
    """The engine with `match` and a drafter that is switched off while it is slower."""
    length = Controller(lm.profile) if lm.drafter.draft_len else 0
    yield from engine.serve(
        lm.target, lm.drafter, requests, verifier=match, draft_len=length, rows=rows, slots=room
    )


def slots(lm: SpeculativeLM, source: Source, settings: CorpusSettings) -> int:
    """Number of positions a row needs. Raises UsageError if the target has fewer."""
    needed = source.longest + settings.max_tokens
    if needed > lm.max_len:
        raise UsageError(
            f"prompts of up to {source.longest} tokens and answers of {settings.max_tokens} "
            f"exceed max_len {lm.max_len}; lower --max-tokens, or raise --max-model-len "
            f"(the model's own limit is {lm.target.info.max_positions})"
        )
    return needed


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of a key: a row, or the reason why it has none. It took `generated` tokens."""

    row: Row | None
    generated: int = 0
    cut: bool = False
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: SourcePrompt
    opening: Opening | None  # being written; None: the answer is being written


class _Feed:
    """The engine's requests: answers to finished openings first, then new prompts."""

    def __init__(
        self,
        lm: SpeculativeLM,
        source: Source,
        ledger: Ledger,
        settings: CorpusSettings,
        goal: int,
        on_prompt: Callable[[int], None],
    ) -> None:
        self.lm = lm
        self.source = source
        self.ledger = ledger
        self.settings = settings
        self.goal = goal
        self.on_prompt = on_prompt
        self.count = 0  # of prompts taken
        self.prompts = source.prompts(ledger.keys)
        self.ready: deque[tuple[_Job, Request]] = deque()
        self.running: dict[int, _Job] = {}
        self.order: deque[int] = deque()  # keys that were started and are not settled
        self.outcomes: dict[int, _Outcome] = {}
        self.waiting = 0  # tokens of the rows in `outcomes`
        self.unsettled = 0
        self.place = 0
        self.exhausted = False
        self.consecutive_drops = 0

    def __iter__(self) -> Self:
        self.place = 0  # a new engine numbers its requests from 0
        self.running = {}
        return self

    def __next__(self) -> Request | None:
        """The next request; None while the running rows suffice."""
        if not self.ready and not self._enough():
            self._pull()
        if not self.ready:
            return None
        job, request = self.ready.popleft()
        self.running[self.place] = job
        self.place += 1
        return request

    def settle(self, step: EngineStep, generated: int) -> None:
        """Record the requests that the step finished, in the order of their keys."""
        self.unsettled += generated
        for place, error in step.errors().items():
            key = self.running.pop(place).prompt.key
            self._close(key, _Outcome(None, reason=TARGET_FAILED, detail=error))
        for place, ids, prompt_length in step.finished():
            job = self.running.pop(place)
            if job.opening is not None:
                self._opened(job.prompt, job.opening, ids, prompt_length)
                continue
            key = job.prompt.key
            row = Row(ids, prompt_length, self.settings.temperature(key), key)
            header = () if self.source.opening is None else self.source.opening.header
            new = len(ids) - len(job.prompt.ids) - len(header)
            self._close(key, _Outcome(row, new, job.prompt.cut))

    def _close(self, key: int, outcome: _Outcome) -> None:
        self.outcomes[key] = outcome
        self.waiting += 0 if outcome.row is None else len(outcome.row.tokens)
        while self.order and self.order[0] in self.outcomes:
            if self.ledger.writer.tokens >= self.goal:
                break
            first = self.order.popleft()
            self._settle(first, self.outcomes.pop(first))

    def _settle(self, key: int, outcome: _Outcome) -> None:
        self.unsettled -= outcome.generated
        if outcome.row is None:
            self.ledger.drop(key, outcome.reason, outcome.detail)
            new = False
        else:
            self.waiting -= len(outcome.row.tokens)
            new = self.ledger.add(outcome.row, cut=outcome.cut)
        self.consecutive_drops = 0 if new else self.consecutive_drops + 1
        if self.consecutive_drops >= MAX_CONSECUTIVE_DROPS:
            raise CorpusError(
                f"the last {MAX_CONSECUTIVE_DROPS} texts were all dropped "
                f"({self.ledger.reasons()}), so no new ones are to be expected; "
                f"raise the temperatures, or give prompts with --source jsonl or text"
            )

    def _enough(self) -> bool:
        """Whether the started rows will reach the goal, at the mean length so far."""
        writer = self.ledger.writer
        mean = self.source.longest + self.settings.max_tokens / 2
        if writer.rows:
            mean = writer.tokens / writer.rows
        started = len(self.running) + len(self.ready)
        return writer.tokens + self.waiting + started * mean >= self.goal

    def _pull(self) -> None:
        opening = self.source.opening
        for prompt in self.prompts:
            self.order.append(prompt.key)
            self.count += 1
            self.on_prompt(self.count)
            if prompt.reason:
                outcome = _Outcome(None, reason=prompt.reason, detail=prompt.detail)
                self._close(prompt.key, outcome)
            elif opening is None:
                return self._answer(prompt, prompt.ids)
            else:
                ends = tuple({*opening.ends, *self.lm.end_ids})
                params = SamplingParams(opening.limit, 1.0, stop_token_ids=ends)
                request = Request(prompt.ids, params, row_seed(self.settings.seed, prompt.key))
                return self.ready.append((_Job(prompt, opening), request))
        self.exhausted = True
        return None

    def _opened(
        self, prompt: SourcePrompt, opening: Opening, ids: Int[Tensor, "L"], prompt_length: int
    ) -> None:
        new = ids[prompt_length:].tolist()
        if opening.ends:
            complete = new[-1] in opening.ends
            question = new[:-1]
        else:
            complete = len(new) == opening.limit and new[-1] not in self.lm.end_ids
            question = new
        if not complete:
            self._close(prompt.key, _Outcome(None, len(new), reason=QUESTION_UNENDED))
        elif self._blank(question):
            self._close(prompt.key, _Outcome(None, len(new), reason=QUESTION_EMPTY))
        else:
            self._answer(prompt, (*prompt.ids, *new, *opening.header))

    def _blank(self, question: list[int]) -> bool:
        if self.lm.tokenizer is None:
            return not question
        return not self.lm.tokenizer.decode(question, skip_special_tokens=True).strip()

    def _answer(self, prompt: SourcePrompt, ids: tuple[int, ...]) -> None:
        key = prompt.key
        settings = self.settings
        params = SamplingParams(
            settings.max_tokens, settings.temperature(key), stop_token_ids=self.lm.end_ids
        )
        # The seed of the opening serves again: every draw is keyed by its position, and the
        # opening's positions came earlier.
        request = Request(ids, params, row_seed(settings.seed, key))
        self.ready.append((_Job(prompt, None), request))
