"""The target writes its own corpus: prompts in, rows out, through the engine, until there are enough tokens.

Every row is a function of (target, settings, key): its temperature and all its randomness hang on its key alone, and `match`
makes the text the same with any drafter and in any batch. So a run that was killed may redo what it lost.
"""

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff import catalog, engine
from specdiff.controller import Controller
from specdiff.data.corpus import Row
from specdiff.data.ledger import Ledger
from specdiff.data.sources import Opening, Prompt, Source
from specdiff.engine import EngineStep, Request
from specdiff.errors import CorpusError, UsageError
from specdiff.noise import row_seed
from specdiff.text.lm import SpeculativeLM
from specdiff.types import SamplingParams
from specdiff.verify import match
from specdiff.weights import fingerprint

FLUSH_SECONDS = 60.0
BARREN = 1000  # texts dropped in a row before it is clear that no new ones come
ROWS = (8, 32, 64, 128, 256, 512)
TRIAL_SECONDS = 20.0  # no further number of rows is tried after these
UNENDED, UNASKED = "question-unended", "question-empty"
TARGET_FAILED = "target-failed"  # its logits were NaN or infinite


@dataclass(frozen=True, slots=True)
class Settings:
    """What a corpus is written with. Raises UsageError naming the bad value."""

    seed: int = 0
    max_tokens: int = 256
    temperatures: tuple[float, ...] = (1.0, 0.7, 0.0)
    shares: tuple[float, ...] = (0.4, 0.2, 0.4)

    def __post_init__(self) -> None:
        if len(self.temperatures) != len(self.shares) or not self.shares:
            raise UsageError(
                f"{len(self.temperatures)} temperatures need as many shares, not {len(self.shares)}"
            )
        if any(not s >= 0 for s in self.shares) or not math.isclose(
            sum(self.shares), 1, abs_tol=1e-6
        ):
            raise UsageError(
                f"shares must be at least 0 and sum to 1, not {', '.join(f'{s:g}' for s in self.shares)} (sum {sum(self.shares):g})"
            )
        for temperature in self.temperatures:
            SamplingParams(max_tokens=self.max_tokens, temperature=temperature)  # refuses bad ones

    def temperature(self, key: int) -> float:
        """The key's own."""
        u = row_seed(row_seed(self.seed, key), 1) / 2**64
        for temperature, share in zip(self.temperatures, self.shares, strict=True):
            u -= share
            if u < 0:
                return temperature
        return max(zip(self.shares, self.temperatures, strict=True))[
            1
        ]  # the shares' rounding error


def about(lm: SpeculativeLM, source: Source, settings: Settings) -> dict[str, Any]:
    """All that a row depends on besides its key."""
    spec = lm.target.info.name
    name = str(Path(spec).expanduser().resolve()) if Path(spec).expanduser().is_dir() else spec
    dtype = str(lm.target.info.dtype).removeprefix("torch.")
    return identity(spec) | {
        "target": name,
        "dtype": dtype,
        "source": source.about,
        **asdict(settings),
    }


def identity(spec: str) -> dict[str, str]:
    """A target by name and by content. `target_sha256` is how manifests of earlier versions know it."""
    folder = model_files(spec)
    return {
        "target": spec,
        "target_sha256": first_megabytes(folder),
        "target_weights": fingerprint(folder),
    }


def model_files(spec: str) -> Path:
    """The folder that holds a model's config.json and safetensors on this machine."""
    from transformers.utils import cached_file

    folder = Path(catalog.model_folder(spec))
    if folder.is_dir():
        return folder
    return Path(str(cached_file(str(folder), "config.json"))).parent


def first_megabytes(folder: Path) -> str:
    """SHA-256 over config.json, and the name, size and first megabyte of each weight file: what older manifests hold."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(1 << 20))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Written:
    """What a round generated, and how many generated tokens wait for their text, or for that of an earlier key, to end."""

    tokens: int
    unsettled: int = 0


def generate(
    lm: SpeculativeLM, source: Source, tally: Ledger, settings: Settings, *, tokens: int, rows: int
) -> Iterator[Written]:
    """Write rows until the corpus has `tokens` tokens, or the source gives out; yields what each round generated.

    Rows are settled in the order of their keys, and the corpus ends with the first key that reaches the goal: the same seed
    gives the same rows, however many are written at a time. Close the generator at any time: the writer's next flush keeps
    the settled rows. Raises CorpusError where only duplicates or unusable prompts come.
    """
    feed = _Feed(lm, source, tally, settings, tokens)
    flushed = time.monotonic()
    while tally.writer.tokens < tokens and not feed.exhausted:
        with closing(serve(lm, iter(feed), slots(lm, source, settings), rows)) as turns:
            for turn in turns:
                generated = int(turn.round.emitted.sum())
                feed.settle(turn, generated)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    tally.writer.flush()
                    flushed = time.monotonic()
                yield Written(generated, feed.unsettled)
                if tally.writer.tokens >= tokens:
                    return


def serve(
    lm: SpeculativeLM, requests: Iterator[Request | None], room: int, rows: int
) -> Generator[EngineStep, None, None]:
    """The engine, as a corpus needs it: `match`, and a drafter only while it pays."""
    length = Controller(lm.drafter.draft_len) if lm.drafter.draft_len else 0
    yield from engine.serve(
        lm.target, lm.drafter, requests, verifier=match, draft_len=length, rows=rows, slots=room
    )


def slots(lm: SpeculativeLM, source: Source, settings: Settings) -> int:
    """Positions a row needs. Raises UsageError if the target has fewer."""
    needed = source.longest + settings.max_tokens
    if needed > lm.max_len:
        raise UsageError(
            f"prompts of up to {source.longest} tokens and answers of {settings.max_tokens} exceed max_len {lm.max_len}; "
            f"lower --max-tokens, or raise --max-model-len (the model's own limit is {lm.target.info.max_positions})"
        )
    return needed


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a key: a row, or the reason why it has none. `generated` tokens went into it."""

    row: Row | None
    generated: int = 0
    cut: bool = False
    refused: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: Prompt
    opening: Opening | None  # still to be settled; None: the answer is being written


class _Feed:
    """The engine's stream: new prompts, and before them the answers to openings that have come back."""

    def __init__(
        self, lm: SpeculativeLM, source: Source, tally: Ledger, settings: Settings, goal: int
    ) -> None:
        self.lm, self.source, self.tally, self.settings, self.goal = (
            lm,
            source,
            tally,
            settings,
            goal,
        )
        self.prompts = source.prompts(tally.known)
        self.ready: deque[tuple[_Job, Request]] = deque()
        self.running: dict[int, _Job] = {}
        self.order: deque[int] = deque()  # keys that were begun and not settled yet
        self.outcomes: dict[int, _Outcome] = {}
        self.waiting = 0  # tokens of the rows in `outcomes`
        self.unsettled = 0
        self.place = 0
        self.exhausted = False
        self.barren = 0

    def __iter__(self) -> Self:
        self.place, self.running = 0, {}  # a new engine numbers its requests from 0
        return self

    def __next__(self) -> Request | None:
        """What to run next; None while the rows that run will do."""
        if not self.ready and not self._enough():
            self._pull()
        if not self.ready:
            return None
        job, request = self.ready.popleft()
        self.running[self.place] = job
        self.place += 1
        return request

    def settle(self, turn: EngineStep, generated: int) -> None:
        """Take in what the turn finished, in the order of keys."""
        self.unsettled += generated
        for place, error in turn.errors().items():
            self._close(
                self.running.pop(place).prompt.key,
                _Outcome(None, refused=TARGET_FAILED, detail=error),
            )
        for place, ids, prompt_length in turn.finished():
            job = self.running.pop(place)
            if job.opening is not None:
                self._opened(job.prompt, job.opening, ids, prompt_length)
                continue
            key = job.prompt.key
            row = Row(ids, prompt_length, self.settings.temperature(key), key)
            header = () if self.source.opening is None else self.source.opening.header
            self._close(
                key, _Outcome(row, len(ids) - len(job.prompt.ids) - len(header), job.prompt.cut)
            )

    def _close(self, key: int, outcome: _Outcome) -> None:
        self.outcomes[key] = outcome
        self.waiting += 0 if outcome.row is None else len(outcome.row.tokens)
        while (
            self.order and self.order[0] in self.outcomes and self.tally.writer.tokens < self.goal
        ):
            first = self.order.popleft()
            self._settle(first, self.outcomes.pop(first))

    def _settle(self, key: int, outcome: _Outcome) -> None:
        self.unsettled -= outcome.generated
        if outcome.row is None:
            self.tally.drop(key, outcome.refused, outcome.detail)
            new = False
        else:
            self.waiting -= len(outcome.row.tokens)
            new = self.tally.add(outcome.row, cut=outcome.cut)
        self.barren = 0 if new else self.barren + 1
        if self.barren >= BARREN:
            raise CorpusError(
                f"the last {BARREN} texts were all dropped ({self.tally.reasons()}), so no new ones are to be expected; "
                f"raise the temperatures, or give prompts with --source jsonl or text"
            )

    def _enough(self) -> bool:
        """Whether the rows begun will reach the goal, at the mean length so far."""
        writer = self.tally.writer
        mean = (
            writer.tokens / writer.rows
            if writer.rows
            else self.source.longest + self.settings.max_tokens / 2
        )
        return (
            writer.tokens + self.waiting + (len(self.running) + len(self.ready)) * mean >= self.goal
        )

    def _pull(self) -> None:
        for prompt in self.prompts:
            self.order.append(prompt.key)
            if prompt.refused:
                self._close(
                    prompt.key, _Outcome(None, refused=prompt.refused, detail=prompt.detail)
                )
            elif self.source.opening is None:
                return self._answer(prompt, prompt.ids)
            else:
                opening = self.source.opening
                params = SamplingParams(
                    opening.limit, 1.0, stop_token_ids=tuple({*opening.ends, *self.lm.end_ids})
                )
                return self.ready.append(
                    (
                        _Job(prompt, opening),
                        Request(prompt.ids, params, row_seed(self.settings.seed, prompt.key)),
                    )
                )
        self.exhausted = True
        return None

    def _opened(
        self, prompt: Prompt, opening: Opening, ids: Int[Tensor, "L"], prompt_length: int
    ) -> None:
        said = ids[prompt_length:].tolist()
        whole = (
            said[-1] in opening.ends
            if opening.ends
            else len(said) == opening.limit and said[-1] not in self.lm.end_ids
        )
        question = said[:-1] if opening.ends else said
        if not whole:
            self._close(prompt.key, _Outcome(None, len(said), refused=UNENDED))
        elif not question or (
            self.lm.tokenizer is not None
            and not self.lm.tokenizer.decode(question, skip_special_tokens=True).strip()
        ):
            self._close(prompt.key, _Outcome(None, len(said), refused=UNASKED))
        else:
            self._answer(prompt, (*prompt.ids, *said, *opening.header))

    def _answer(self, prompt: Prompt, ids: tuple[int, ...]) -> None:
        key, s = prompt.key, self.settings
        params = SamplingParams(s.max_tokens, s.temperature(key), stop_token_ids=self.lm.end_ids)
        # the opening's own seed: its draws were for earlier positions, and every draw's key holds its position
        self.ready.append((_Job(prompt, None), Request(ids, params, row_seed(s.seed, key))))


def first_prompt(source: Source) -> Prompt:
    """The first prompt that can be used. Raises UsageError for a source without one, saying why."""
    why = ""
    for prompt in source.prompts(()):
        if not prompt.refused:
            return prompt
        why = why or f" (the first: {prompt.detail or prompt.refused})"
    raise UsageError(f"the source holds no usable prompt{why}")


def trial(
    lm: SpeculativeLM, source: Source, settings: Settings, rows: int | None = None, rounds: int = 3
) -> tuple[int, float]:
    """(rows, generated tokens a second): of the number given, or of the fewest that more rows do not better by a tenth.

    The fastest round counts: on a shared machine the others measure the neighbours.

    Raises UsageError for a source without prompts.
    """
    room = slots(lm, source, settings)
    prompt = first_prompt(source)
    params = SamplingParams(max(2, min(rounds + 1, settings.max_tokens)))
    best, missed, begin = (0, 0.0), 0, time.monotonic()
    for tried in ROWS if rows is None else (rows,):
        too_big = tried * room * _position_bytes(lm) > _free_bytes(lm.target.info.device) / 3
        if best[0] and (too_big or missed == 2 or time.monotonic() - begin > TRIAL_SECONDS):
            break
        rate, last = 0.0, 0.0
        for turn in serve(
            lm, iter([Request(prompt.ids, params, seed) for seed in range(tried)]), room, tried
        ):
            made, now = (
                int(turn.round.emitted.sum()),
                time.perf_counter(),
            )  # reading the count waits for the device
            rate, last = max(rate, made / (now - last) if last else 0.0), now
        better = rate >= 1.1 * best[1]
        best, missed = ((tried, rate), 0) if better else (best, missed + 1)
    return best


def _position_bytes(lm: SpeculativeLM) -> int:
    """Keys and values of one position of one row."""
    info, config = lm.target.info, getattr(getattr(lm.target, "model", None), "config", None)
    text = config.get_text_config() if config is not None else None
    heads = getattr(text, "num_attention_heads", None) or 1
    shared = (getattr(text, "num_key_value_heads", None) or heads) / heads
    return int(2 * info.layers * info.hidden_size * shared * info.dtype.itemsize)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 << 30
