"""The suite for a target: what it scores is a function of the row's tokens alone, whatever was drafted, rejected or beside them.

Shapes: B rows, N scored positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff import engine
from specdiff.check.drafters import requests, written
from specdiff.check.findings import Finding
from specdiff.check.toys import Hinted
from specdiff.drafters.base import NoDrafter
from specdiff.targets.base import Target
from specdiff.types import Batch, Draft, SamplingParams, TargetOutput, Verification
from specdiff.verify import match

ASKED = (SamplingParams(max_tokens=12), SamplingParams(max_tokens=8, temperature=0))
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of the logits' spread


class Watched(Target[Any]):
    """`inner`, with every scored row kept: (its text and draft, its logits)."""

    def __init__(self, inner: Target[Any]) -> None:
        self.inner, self.info = inner, inner.info
        self.seen: list[tuple[list[int], list[int], Float[Tensor, "N V"]]] = []

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> Any:
        return self.inner.open(rows, slots, taps)

    def admit(self, cache: Any, rows: Int[Tensor, "R"], prompts: Sequence[Int[Tensor, "L"]]) -> Float[Tensor, "R N D"] | None:
        return self.inner.admit(cache, rows, prompts)

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache, batch, draft)
        for row in (~batch.done).nonzero()[:, 0].tolist():
            text = batch.ids[row, : batch.length[row]].tolist()
            self.seen.append((text, draft.tokens[row].tolist(), output.logits[row].detach().double().cpu()))
        return output

    def keep(self, cache: Any, batch: Batch, verification: Verification) -> None:
        self.inner.keep(cache, batch, verification)

    def release(self, cache: Any, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(cache, rows)


def check_target(target: Target[Any], *, quick: bool = False) -> Iterator[Finding]:
    """Every finding about a target, each as it is known."""
    asked = requests(target, 5 if quick else 9, ASKED)
    watched, K = Watched(target), 4
    try:
        texts = written(target, NoDrafter(), asked, match)
        known = {int(Batch.of([r.prompt], [r.params], [r.seed]).seed[0]): texts[i] for i, r in enumerate(asked)}
        hinted = Hinted(known, target.info.vocab_size)
        for _ in engine.serve(watched, hinted, asked, verifier=match, draft_len=K, rows=3):
            pass
    except Exception as error:
        yield Finding("scores", False, f"it raised {type(error).__name__}: {error}")
        return
    yield scores(watched)
    if all(logits.shape == (K + 1, target.info.vocab_size) for _, _, logits in watched.seen):
        yield history(watched)


def scores(watched: Watched) -> Finding:
    """Shapes, and logits that are numbers."""
    V = watched.info.vocab_size
    for _, draft, logits in watched.seen:
        if logits.shape != (len(draft) + 1, V):
            return Finding("scores", False, f"{len(draft)} draft tokens got logits {list(logits.shape)}, not {[len(draft) + 1, V]}")
        if bool(logits.isnan().any()) or bool((logits == torch.inf).any()):
            return Finding("scores", False, "it gives logits that are NaN or infinite")
    return Finding("scores", True, f"{len(watched.seen)} rows of logits, all numbers")


def history(watched: Watched) -> Finding:
    """Each row once more in a cache of its own that never saw anything else: rejected drafts and neighbours must not show."""
    target, allowed = watched.inner, TOLERANCE.get(watched.info.dtype, 1e-3)
    worst = 0.0
    for text, draft, logits in watched.seen:
        batch = Batch.of([text], [SamplingParams(max_tokens=len(draft) + 1)], [0], device=target.info.device)
        cache = target.open(1, len(text) + len(draft) + 1)
        with torch.inference_mode():
            target.admit(cache, torch.arange(1, device=target.info.device), [batch.ids[0, : len(text)]])
            fresh = target.score(cache, batch, Draft(torch.tensor([draft], device=target.info.device))).logits[0].double().cpu()
        finite = torch.isfinite(fresh) & torch.isfinite(logits)
        spread = float(fresh[finite].std().clamp(min=1e-9))
        worst = max(worst, float((fresh - logits)[finite].abs().max()) / spread)
    if worst <= allowed:
        return Finding("history", True, f"{len(watched.seen)} rows score as they do in a new cache", worst, allowed)
    message = (
        f"a row's logits are not those of the same tokens in a new cache (off by {worst:.2g} of their spread): entries of rejected "
        "drafts, of an earlier request, or of neighbours show, so the law that is preserved is not the model's"
    )
    return Finding("history", False, message, worst, allowed)
