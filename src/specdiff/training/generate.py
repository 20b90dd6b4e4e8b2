"""The target writes its own corpus: prompts in, rows out, through the engine, until there are enough tokens.

Every row is a function of (target, settings, key): its temperature and all its randomness hang on its key alone, and `match`
makes the text the same with any drafter and in any batch. So a run that was killed may redo what it lost.
"""

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff import catalog, engine
from specdiff.controller import Controller
from specdiff.engine import Request, Turn
from specdiff.errors import CorpusError, UsageError
from specdiff.lm import SpeculativeLM
from specdiff.noise import row_seed
from specdiff.training.corpus import Row
from specdiff.training.prompts import Opening, Prompt, Source
from specdiff.training.tally import Tally
from specdiff.types import SamplingParams
from specdiff.verify import match

FLUSH_SECONDS = 60.0
BARREN = 1000  # texts dropped in a row before it is clear that no new ones come
ROWS = (8, 32, 64, 128, 256, 512)
TRIAL_SECONDS = 20.0  # no further number of rows is tried after these
UNENDED, UNASKED = "question-unended", "question-empty"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a corpus is written with. Raises UsageError naming the bad value."""

    seed: int = 0
    max_tokens: int = 256
    temperatures: tuple[float, ...] = (1.0, 0.7, 0.0)
    shares: tuple[float, ...] = (0.4, 0.2, 0.4)

    def __post_init__(self) -> None:
        if len(self.temperatures) != len(self.shares) or not self.shares:
            raise UsageError(f"{len(self.temperatures)} temperatures need as many shares, not {len(self.shares)}")
        if any(not s >= 0 for s in self.shares) or not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
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
        return max(zip(self.shares, self.temperatures, strict=True))[1]  # the shares' rounding error


def about(lm: SpeculativeLM, source: Source, settings: Settings) -> dict[str, Any]:
    """All that a row depends on besides its key."""
    spec = lm.target.info.name
    name = str(Path(spec).expanduser().resolve()) if Path(spec).expanduser().is_dir() else spec
    dtype = str(lm.target.info.dtype).removeprefix("torch.")
    return {"target": name, "target_sha256": fingerprint(spec), "dtype": dtype, "source": source.about, **asdict(settings)}


def fingerprint(spec: str) -> str:
    """SHA-256 over the target's config.json, and the name, size and first megabyte of each of its weight files."""
    from transformers.utils import cached_file

    folder = Path(catalog.model_folder(spec))
    if not folder.is_dir():
        folder = Path(str(cached_file(str(folder), "config.json"))).parent
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(1 << 20))
    return digest.hexdigest()


def generate(lm: SpeculativeLM, source: Source, tally: Tally, settings: Settings, *, tokens: int, rows: int) -> Iterator[int]:
    """Write rows until the corpus has `tokens` tokens, or the source gives out; yields how many tokens each round generated.

    Rows that are running when the goal comes into reach are finished, or the last ones would be short texts only. Close the
    generator at any time: the writer's next flush keeps the finished rows. Raises CorpusError where nothing new comes any more.
    """
    feed = _Feed(lm, source, tally, settings, tokens)
    flushed = time.monotonic()
    while tally.writer.tokens < tokens and not feed.exhausted:
        for turn in serve(lm, iter(feed), slots(lm, source, settings), rows):
            feed.settle(turn)
            if time.monotonic() - flushed > FLUSH_SECONDS:
                tally.writer.flush()
                flushed = time.monotonic()
            yield int(turn.round.emitted.sum())


def serve(lm: SpeculativeLM, requests: Iterator[Request | None], room: int, rows: int) -> Iterator[Turn]:
    """The engine, as a corpus needs it: `match`, and a drafter only while it pays."""
    length = Controller(lm.drafter.draft_len) if lm.drafter.draft_len else 0
    return engine.serve(lm.target, lm.drafter, requests, verifier=match, draft_len=length, rows=rows, slots=room)


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
class _Job:
    prompt: Prompt
    opening: Opening | None  # still to be settled; None: the answer is being written


class _Feed:
    """The engine's stream: new prompts, and in front of them the answers to openings that have come back."""

    def __init__(self, lm: SpeculativeLM, source: Source, tally: Tally, settings: Settings, goal: int) -> None:
        self.lm, self.source, self.tally, self.settings, self.goal = lm, source, tally, settings, goal
        self.prompts = source.prompts(tally.known)
        self.ready: deque[tuple[_Job, Request]] = deque()
        self.running: dict[int, _Job] = {}
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

    def settle(self, turn: Turn) -> None:
        """Take in what the turn finished."""
        for place, ids, prompt_length in turn.finished():
            job = self.running.pop(place)
            if job.opening is not None:
                self._opened(job.prompt, job.opening, ids, prompt_length)
                continue
            row = Row(ids, prompt_length, self.settings.temperature(job.prompt.key), job.prompt.key)
            self.barren = 0 if self.tally.add(row, cut=job.prompt.cut) else self.barren + 1
        if self.barren >= BARREN:
            raise CorpusError(
                f"the last {BARREN} texts were all dropped ({self.tally.summary()['dropped']}), so no new ones are to be expected; "
                f"raise the temperatures, or give prompts with --source jsonl or text"
            )

    def _enough(self) -> bool:
        """Whether the running rows will reach the goal, at the mean length so far."""
        writer = self.tally.writer
        mean = writer.tokens / writer.rows if writer.rows else self.source.longest + self.settings.max_tokens / 2
        return writer.tokens + (len(self.running) + len(self.ready)) * mean >= self.goal

    def _pull(self) -> None:
        for prompt in self.prompts:
            if prompt.refused:
                self.tally.drop(prompt.key, prompt.refused)
            elif self.source.opening is None:
                return self._answer(prompt, prompt.ids)
            else:
                opening = self.source.opening
                params = SamplingParams(opening.limit, 1.0, stop_token_ids=tuple({*opening.ends, *self.lm.end_ids}))
                return self.ready.append((_Job(prompt, opening), Request(prompt.ids, params, row_seed(self.settings.seed, prompt.key))))
        self.exhausted = True
        return None

    def _opened(self, prompt: Prompt, opening: Opening, ids: Int[Tensor, "L"], prompt_length: int) -> None:
        said = ids[prompt_length:].tolist()
        whole = said[-1] in opening.ends if opening.ends else len(said) == opening.limit and said[-1] not in self.lm.end_ids
        asked = said[:-1] if opening.ends else said
        if not whole:
            self._drop(prompt.key, UNENDED)
        elif not asked or (self.lm.tokenizer is not None and not self.lm.tokenizer.decode(asked, skip_special_tokens=True).strip()):
            self._drop(prompt.key, UNASKED)
        else:
            self._answer(prompt, (*prompt.ids, *said, *opening.header))

    def _drop(self, key: int, why: str) -> None:
        self.barren += 1
        self.tally.drop(key, why)

    def _answer(self, prompt: Prompt, ids: tuple[int, ...]) -> None:
        key, s = prompt.key, self.settings
        params = SamplingParams(s.max_tokens, s.temperature(key), stop_token_ids=self.lm.end_ids)
        # the opening's own seed: its draws were for earlier positions, and every draw's key holds its position
        self.ready.append((_Job(prompt, None), Request(ids, params, row_seed(s.seed, key))))


def trial(lm: SpeculativeLM, source: Source, settings: Settings, rows: int | None = None, rounds: int = 3) -> tuple[int, float]:
    """(rows, generated tokens a second): of the number given, or of the fewest that more rows do not better by a tenth.

    The fastest round counts: on a shared machine the others measure the neighbours.

    Raises UsageError for a source without prompts.
    """
    room = slots(lm, source, settings)
    prompt = next((p for p in source.prompts(()) if not p.refused), None)
    if prompt is None:
        raise UsageError("the source holds no usable prompt")
    params = SamplingParams(max(2, min(rounds + 1, settings.max_tokens)))
    best, missed, begin = (0, 0.0), 0, time.monotonic()
    for tried in ROWS if rows is None else (rows,):
        too_big = tried * room * _position_bytes(lm) > _free_bytes(lm.target.info.device) / 3
        if best[0] and (too_big or missed == 2 or time.monotonic() - begin > TRIAL_SECONDS):
            break
        rate, last = 0.0, 0.0
        for turn in serve(lm, iter([Request(prompt.ids, params, seed) for seed in range(tried)]), room, tried):
            made, now = int(turn.round.emitted.sum()), time.perf_counter()  # reading the count waits for the device
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
