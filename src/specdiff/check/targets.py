"""The suite for a target: scores depend on the row's tokens alone, not on rejected or other rows'.

Shapes: B rows, N scored positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff import engine
from specdiff.check.doubles import Hinted
from specdiff.check.findings import Finding
from specdiff.check.recording import requests, written
from specdiff.drafters.base import NoDrafter
from specdiff.engine import Request
from specdiff.targets.base import Target, TargetWrapper
from specdiff.types import Batch, Draft, SamplingParams, TargetOutput
from specdiff.verify import match

K = 4
ROWS = 3
LENGTHS = (2, 9, 33, 130, 520)  # of rows in one batch, as far as the target has positions
STRETCH = 24  # drafted tokens, far enough to reach over what changes on the way
PARAMS = (SamplingParams(max_tokens=12), SamplingParams(max_tokens=8, temperature=0))
# of the logits' spread
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}


class WatchedTarget(TargetWrapper[Any]):
    """`inner`, recording every scored row (its text, draft and logits), and counting the prompt
    tokens that were not read."""

    def __init__(self, inner: Target[Any]) -> None:
        super().__init__(inner)
        self.samples: list[tuple[list[int], list[int], Float[Tensor, "N V"]]] = []
        self.reused = 0

    def admit(
        self,
        cache: Any,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        prefix_lengths: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        self.reused += int(prefix_lengths.sum())
        return self.inner.admit(cache, rows, prompts, prefix_lengths)

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache, batch, draft)
        for row in (~batch.done).nonzero()[:, 0].tolist():
            text = batch.ids[row, : batch.length[row]].tolist()
            logits = output.logits[row].detach().double().cpu()
            self.samples.append((text, draft.tokens[row].tolist(), logits))
        return output


def check_target(target: Target[Any], *, quick: bool = False) -> Iterator[Finding]:
    """Every finding about a target, one by one."""
    queue = requests(target, 5 if quick else 9, PARAMS)
    waves: list[Sequence[Request]] = []
    try:
        watched = served(target, [queue])
        for i in range(0, len(queue), ROWS):
            waves += continued(target, queue[i : i + ROWS])
        reusing = served(target, waves)
    except Exception as error:
        yield Finding("scores", False, f"it raised {type(error).__name__}: {error}")
        return
    yield scores(watched)
    if all(logits.shape == (K + 1, target.info.vocab_size) for _, _, logits in watched.samples):
        yield history(watched)
        yield reuse(reusing)
        yield lengths(target, quick=quick)


def continued(target: Target[Any], queue: Sequence[Request]) -> list[Sequence[Request]]:
    """The requests, then others whose prompts begin as their texts did.

    These are the whole text and more, its beginning and other tokens, and its beginning alone.
    """
    later = []
    for i, (request, text) in enumerate(zip(queue, _texts(target, queue), strict=True)):
        half = len(text) // 2
        other = (text[half] + 1) % (max(text) + 1)
        prompts = ([*text, other], [*text[:half], other, other], text[:-3] or text)
        later.append(replace(request, prompt=prompts[i % 3], seed=request.seed + 1))
    return [queue, later]


def served(target: Target[Any], waves: Sequence[Sequence[Request]]) -> WatchedTarget:
    """Every row scored while the requests run, with drafts close to their texts.

    A wave joins when the last has ended.
    """
    watched = WatchedTarget(target)
    everything = list(chain.from_iterable(waves))
    running = 0

    def stream() -> Iterator[Request | None]:
        nonlocal running
        for wave in waves:
            while running:
                yield None
            running = len(wave)
            yield from wave

    texts = _texts(target, everything)
    by_seed = {
        int(Batch.of([r.prompt], [r.params], [r.seed]).seed[0]): text
        for r, text in zip(everything, texts, strict=True)
    }
    hinted = Hinted(by_seed, target.info.vocab_size)
    slots = max(len(r.prompt) + r.params.max_tokens for r in everything)
    for step in engine.serve(
        watched, hinted, stream(), verifier=match, draft_len=K, rows=ROWS, slots=slots
    ):
        running -= len(step.ended)
    return watched


def _texts(target: Target[Any], queue: Sequence[Request]) -> list[list[int]]:
    results = written(target, NoDrafter(), queue, match)
    return [results[i] for i in range(len(queue))]


def scores(watched: WatchedTarget) -> Finding:
    """Shapes, and logits that are numbers."""
    V = watched.info.vocab_size
    for _, draft, logits in watched.samples:
        shape = (len(draft) + 1, V)
        if logits.shape != shape:
            message = (
                f"{len(draft)} draft tokens got logits {list(logits.shape)}, not {list(shape)}"
            )
            return Finding("scores", False, message)
        if bool(logits.isnan().any()) or bool((logits == torch.inf).any()):
            return Finding("scores", False, "it gives logits that are NaN or infinite")
    return Finding("scores", True, f"{len(watched.samples)} rows of logits, all numbers")


def history(watched: WatchedTarget) -> Finding:
    """Rejected drafts and neighbors must not show."""
    worst = apart(watched)
    allowed = _allowed(watched)
    if worst <= allowed:
        message = f"{len(watched.samples)} rows score as they do in a new cache"
        return Finding("history", True, message, worst, allowed)
    message = (
        f"a row's logits are not those of the same tokens in a new cache (off by {worst:.2g} of "
        f"their spread): entries of rejected drafts, of an earlier request, or of neighbors show, "
        f"so the law that is preserved is not the model's"
    )
    return Finding("history", False, message, worst, allowed)


def reuse(watched: WatchedTarget) -> Finding:
    """Nor must it show that the cache of a prompt's first tokens is an earlier request's."""
    worst = apart(watched)
    allowed = _allowed(watched)
    if worst <= allowed:
        message = (
            f"{len(watched.samples)} rows score as they do in a new cache, {watched.reused} prompt "
            f"tokens being left from earlier requests"
        )
        return Finding("reuse", True, message, worst, allowed)
    message = (
        f"after a prompt that begins as the row's text before did, logits are not those of a new "
        f"cache (off by {worst:.2g} of their spread): `admit` must take over at most the first "
        f"`prefix_lengths` positions, and rounds must leave those as they were committed"
    )
    return Finding("reuse", False, message, worst, allowed)


def _allowed(watched: WatchedTarget) -> float:
    return TOLERANCE.get(watched.info.dtype, 1e-3)


def apart(watched: WatchedTarget) -> float:
    """The largest distance of logits from those of the same row in a new cache of its own."""
    distances = [
        distance(logits, alone(watched.inner, text, draft))
        for text, draft, logits in watched.samples
    ]
    return max(distances, default=0.0)


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
    """A short row with long ones, a long draft, and a second stream: each position must score as in
    plain decoding."""
    allowed = TOLERANCE.get(target.info.dtype, 1e-3)
    try:
        worst = stretched(target, LENGTHS[:-1] if quick else LENGTHS)
    except Exception as error:
        message = f"with rows of very different length it raised {type(error).__name__}: {error}"
        return Finding("lengths", False, message)
    if worst <= allowed:
        message = "rows of very different length, in two streams, score as they do alone"
        return Finding("lengths", True, message, worst, allowed)
    message = (
        f"logits depend on how long the neighbors or the draft are, or on what another stream read "
        f"meanwhile (off by {worst:.2g} of their spread): each position must be scored as if the "
        f"text ended there and nothing else were in the cache"
    )
    return Finding("lengths", False, message, worst, allowed)


@torch.inference_mode()
def stretched(target: Target[Any], row_lengths: Sequence[int]) -> float:
    """The distance of a long draft's first and last position from plain decoding, at worst."""
    device = target.info.device
    room = target.info.max_positions - STRETCH - 1
    sizes = sorted({max(1, min(size, room)) for size in row_lengths})
    width = sizes[-1] + STRETCH
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(target.info.vocab_size, (len(sizes), width), generator=generator)
    texts = [row[: size + STRETCH].tolist() for row, size in zip(ids, sizes, strict=True)]
    expected = [
        torch.cat([alone(target, text[:size]), alone(target, text)])
        for text, size in zip(texts, sizes, strict=True)
    ]

    def stream(rows: Sequence[int]) -> Iterator[Float[Tensor, "B N V"]]:
        """One step at a time: read the prompts, reject a draft, score the text itself as one."""
        prompts = [texts[row][: sizes[row]] for row in rows]
        params = [SamplingParams(max_tokens=STRETCH + 1)] * len(rows)
        batch = Batch.of(prompts, params, [0] * len(rows), device=device)
        cache = target.open(len(rows), width + 1)
        places = torch.arange(len(rows), device=device)
        right = torch.tensor([texts[row][sizes[row] :] for row in rows], device=device)
        prompt_ids = [torch.tensor(prompt, device=device) for prompt in prompts]
        target.admit(cache, places, prompt_ids, torch.zeros_like(places))
        for draft in ((right + 1) % target.info.vocab_size, right):
            yield target.score(cache, batch, Draft(draft)).logits.double().cpu()

    second = min(1, len(sizes) - 1)  # not the first row's text, so that streams that meet differ
    together = stream(range(len(sizes)))
    single = stream([second])
    rounds = [(next(together), next(single)) for _ in range(2)]
    all_rows, one_row = rounds[-1]
    pairs = [*zip(all_rows, expected, strict=True), (one_row[0], expected[second])]
    return max(distance(logits[[0, -1]], plain) for logits, plain in pairs)
