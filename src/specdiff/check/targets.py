"""The suite for a target: what it scores is a function of the row's tokens alone, whatever was drafted, rejected or beside them.

Shapes: B rows, N scored positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff import engine
from specdiff.check.doubles import Hinted
from specdiff.check.drafters import requests, written
from specdiff.check.findings import Finding
from specdiff.drafters.base import NoDrafter
from specdiff.engine import Request
from specdiff.targets.base import Target
from specdiff.types import Batch, Draft, SamplingParams, TargetOutput, Verification
from specdiff.verify import match

K, ROWS = 4, 3
LENGTHS = (
    2,
    9,
    33,
    130,
    520,
)  # of rows that stand side by side, as far as the target has positions
STRETCH = 24  # drafted tokens, far enough to reach over what changes on the way
ASKED = (SamplingParams(max_tokens=12), SamplingParams(max_tokens=8, temperature=0))
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}  # of the logits' spread


class Watched(Target[Any]):
    """`inner`, with every scored row kept (its text and draft, its logits), and the prompt tokens counted that were not read."""

    def __init__(self, inner: Target[Any]) -> None:
        self.inner, self.info = inner, inner.info
        self.seen: list[tuple[list[int], list[int], Float[Tensor, "N V"]]] = []
        self.reused = 0

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> Any:
        return self.inner.open(rows, slots, taps)

    def admit(
        self,
        cache: Any,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        kept: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        self.reused += int(kept.sum())
        return self.inner.admit(cache, rows, prompts, kept)

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache, batch, draft)
        for row in (~batch.done).nonzero()[:, 0].tolist():
            text = batch.ids[row, : batch.length[row]].tolist()
            self.seen.append(
                (text, draft.tokens[row].tolist(), output.logits[row].detach().double().cpu())
            )
        return output

    def keep(self, cache: Any, batch: Batch, verification: Verification) -> None:
        self.inner.keep(cache, batch, verification)

    def release(self, cache: Any, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(cache, rows)


def check_target(target: Target[Any], *, quick: bool = False) -> Iterator[Finding]:
    """Every finding about a target, each as it is known."""
    asked = requests(target, 5 if quick else 9, ASKED)
    try:
        watched = served(target, [asked])
        reusing = served(
            target,
            [
                wave
                for i in range(0, len(asked), ROWS)
                for wave in continued(target, asked[i : i + ROWS])
            ],
        )
    except Exception as error:
        yield Finding("scores", False, f"it raised {type(error).__name__}: {error}")
        return
    yield scores(watched)
    if all(logits.shape == (K + 1, target.info.vocab_size) for _, _, logits in watched.seen):
        yield history(watched)
        yield reuse(reusing)
        yield lengths(target, quick=quick)


def continued(target: Target[Any], asked: Sequence[Request]) -> list[Sequence[Request]]:
    """The requests, and behind them others whose prompts begin as their texts did: the whole text and more, a beginning of it and
    other tokens, and a beginning alone."""
    later = []
    for i, (request, text) in enumerate(zip(asked, _texts(target, asked), strict=True)):
        other = (text[len(text) // 2] + 1) % (max(text) + 1)
        prompt = ([*text, other], [*text[: len(text) // 2], other, other], text[:-3] or text)[i % 3]
        later.append(replace(request, prompt=prompt, seed=request.seed + 1))
    return [asked, later]


def served(target: Target[Any], waves: Sequence[Sequence[Request]]) -> Watched:
    """Every row scored while the requests run, drafted by one who knows their texts; a wave joins when the last has ended."""
    watched, everything = Watched(target), [request for wave in waves for request in wave]
    running = 0

    def stream() -> Iterator[Request | None]:
        nonlocal running
        for wave in waves:
            while running:
                yield None
            running = len(wave)
            yield from wave

    texts = _texts(target, everything)
    known = {
        int(Batch.of([r.prompt], [r.params], [r.seed]).seed[0]): text
        for r, text in zip(everything, texts, strict=True)
    }
    hinted = Hinted(known, target.info.vocab_size)
    slots = max(len(r.prompt) + r.params.max_tokens for r in everything)
    for turn in engine.serve(
        watched, hinted, stream(), verifier=match, draft_len=K, rows=ROWS, slots=slots
    ):
        running -= len(turn.ended)
    return watched


def _texts(target: Target[Any], asked: Sequence[Request]) -> list[list[int]]:
    found = written(target, NoDrafter(), asked, match)
    return [found[i] for i in range(len(asked))]


def scores(watched: Watched) -> Finding:
    """Shapes, and logits that are numbers."""
    V = watched.info.vocab_size
    for _, draft, logits in watched.seen:
        if logits.shape != (len(draft) + 1, V):
            return Finding(
                "scores",
                False,
                f"{len(draft)} draft tokens got logits {list(logits.shape)}, not {[len(draft) + 1, V]}",
            )
        if bool(logits.isnan().any()) or bool((logits == torch.inf).any()):
            return Finding("scores", False, "it gives logits that are NaN or infinite")
    return Finding("scores", True, f"{len(watched.seen)} rows of logits, all numbers")


def history(watched: Watched) -> Finding:
    """Rejected drafts and neighbours must not show."""
    worst, allowed = apart(watched), _allowed(watched)
    if worst <= allowed:
        return Finding(
            "history",
            True,
            f"{len(watched.seen)} rows score as they do in a new cache",
            worst,
            allowed,
        )
    message = (
        f"a row's logits are not those of the same tokens in a new cache (off by {worst:.2g} of their spread): entries of rejected "
        "drafts, of an earlier request, or of neighbours show, so the law that is preserved is not the model's"
    )
    return Finding("history", False, message, worst, allowed)


def reuse(watched: Watched) -> Finding:
    """Neither must it show that a prompt's first tokens were taken from what the row had read for the request before."""
    worst, allowed = apart(watched), _allowed(watched)
    if worst <= allowed:
        told = f"{len(watched.seen)} rows score as they do in a new cache, {watched.reused} prompt tokens being left from earlier requests"
        return Finding("reuse", True, told, worst, allowed)
    message = (
        f"after a prompt that begins as the row's text before did, logits are not those of a new cache (off by {worst:.2g} of their "
        "spread): `admit` must take over at most the `kept` first positions, and rounds must leave those as they were committed"
    )
    return Finding("reuse", False, message, worst, allowed)


def _allowed(watched: Watched) -> float:
    return TOLERANCE.get(watched.info.dtype, 1e-3)


def apart(watched: Watched) -> float:
    """How far logits are from those of the same row, once more, in a cache of its own that never saw anything else."""
    return max(
        (
            distance(logits, alone(watched.inner, text, draft))
            for text, draft, logits in watched.seen
        ),
        default=0.0,
    )


@torch.inference_mode()
def alone(
    target: Target[Any], text: Sequence[int], draft: Sequence[int] = ()
) -> Float[Tensor, "N V"]:
    """What a target scores in a new cache that holds this row and nothing else."""
    device = target.info.device
    batch = Batch.of([text], [SamplingParams(max_tokens=len(draft) + 1)], [0], device=device)
    cache = target.open(1, len(text) + len(draft) + 1)
    row = torch.zeros(1, dtype=torch.long, device=device)
    target.admit(cache, row, [batch.ids[0, : len(text)]], torch.zeros_like(row))
    drafted = torch.tensor([list(draft)], dtype=torch.long, device=device)
    return target.score(cache, batch, Draft(drafted)).logits[0].double().cpu()


def distance(logits: Float[Tensor, "N V"], expected: Float[Tensor, "N V"]) -> float:
    """The largest difference, in units of the expected logits' spread."""
    finite = torch.isfinite(expected) & torch.isfinite(logits)
    spread = float(expected[finite].std().clamp(min=1e-9))
    return float((expected - logits)[finite].abs().max()) / spread


def lengths(target: Target[Any], *, quick: bool = False) -> Finding:
    """A short row beside long ones, a long draft, and a second stream: each position as plain decoding would score it."""
    allowed = TOLERANCE.get(target.info.dtype, 1e-3)
    try:
        worst = stretched(target, LENGTHS[:-1] if quick else LENGTHS)
    except Exception as error:
        return Finding(
            "lengths",
            False,
            f"with rows of very different length it raised {type(error).__name__}: {error}",
        )
    if worst <= allowed:
        return Finding(
            "lengths",
            True,
            "rows of very different length, in two streams, score as they do alone",
            worst,
            allowed,
        )
    message = (
        f"logits depend on how long the neighbors or the draft are, or on what another stream read meanwhile (off by {worst:.2g} "
        f"of their spread): each position must be scored as if the text ended there and nothing else were in the cache"
    )
    return Finding("lengths", False, message, worst, allowed)


@torch.inference_mode()
def stretched(target: Target[Any], wanted: Sequence[int]) -> float:
    """How far the first and the last position of a long draft are from plain decoding, for rows of the lengths `wanted`."""
    device = target.info.device
    room = target.info.max_positions - STRETCH - 1
    sizes = sorted({max(1, min(size, room)) for size in wanted})
    width = sizes[-1] + STRETCH
    ids = torch.randint(
        target.info.vocab_size, (len(sizes), width), generator=torch.Generator().manual_seed(11)
    )
    texts = [row[: size + STRETCH].tolist() for row, size in zip(ids, sizes, strict=True)]
    expected = [
        torch.cat([alone(target, text[:size]), alone(target, text)])
        for text, size in zip(texts, sizes, strict=True)
    ]

    def stream(rows: Sequence[int]) -> Iterator[Float[Tensor, "B N V"]]:
        """The prompts are read, a draft is rejected, the text itself is scored as a draft: a step at a time."""
        prompts = [texts[row][: sizes[row]] for row in rows]
        params = [SamplingParams(max_tokens=STRETCH + 1)] * len(rows)
        batch = Batch.of(prompts, params, [0] * len(rows), device=device)
        cache = target.open(len(rows), width + 1)
        places = torch.arange(len(rows), device=device)
        right = torch.tensor([texts[row][sizes[row] :] for row in rows], device=device)
        target.admit(
            cache,
            places,
            [torch.tensor(prompt, device=device) for prompt in prompts],
            torch.zeros_like(places),
        )
        for draft in ((right + 1) % target.info.vocab_size, right):
            yield target.score(cache, batch, Draft(draft)).logits.double().cpu()

    second = min(1, len(sizes) - 1)  # not the first row's text, so that streams that meet differ
    together = stream(range(len(sizes)))
    beside = stream([second])
    rounds = [(next(together), next(beside)) for _ in range(2)]
    all_rows, one_row = rounds[-1]
    pairs = [*zip(all_rows, expected, strict=True), (one_row[0], expected[second])]
    return max(distance(logits[[0, -1]], plain) for logits, plain in pairs)
