"""An answer as it grows: what rounds gave, folded into tokens, text, log probabilities and the reason it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from specdiff.engine import RequestOutput
from specdiff.errors import TargetError
from specdiff.stats import Stats
from specdiff.text.detokenizer import Detokenizer


@dataclass(slots=True)
class Generation:
    """One answer. `accepted[i]`: token i came from the draft.

    finish_reason: "stop" (end of text, stop id or stop string), "length", "interrupted" (a conversation's, by its user), or "error"
    (the target failed; `error` says how). `text` ends before a stop string, `token_ids` with the token that completed it. logprobs,
    where asked: the target's own of each token, before any option; `top_logprobs[i]` the (token id, logprob) of the likeliest in
    place i.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    finish_reason: str = ""
    stats: Stats = field(default_factory=Stats)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    error: str | None = None


def demand_whole(generations: Sequence[Generation]) -> None:
    """Raises TargetError, with all of them, if the target failed under one."""
    failures = [(place, g.error) for place, g in enumerate(generations) if g.error is not None]
    if failures:
        place, error = failures[0]
        more = f" (and {len(failures) - 1} more failed)" if len(failures) > 1 else ""
        raise TargetError(f"answer {place} of {len(generations)}: {error}{more}", generations)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A bit of streamed text. `accepted`: it came from the draft. `generation` is the answer so far, whole with the last piece."""

    text: str
    accepted: bool
    generation: Generation


class Answer:
    """Folds one request's RequestOutput into `generation`. `done` may be true before the engine's own end, at a stop string: cancel then."""

    def __init__(self, text: Detokenizer) -> None:
        self.generation, self.text, self.done = Generation(), text, False

    def add(self, p: RequestOutput) -> list[Chunk]:
        """The text this round brought, a piece a token that completes some, and a last one when the answer is done.

        Tokens behind the one that completes a stop string never were: neither in the lists nor in the stats.
        """
        g, pieces, kept = self.generation, [], 0
        while kept < len(p.tokens) and not self.text.stopped:
            if new := self.text.add(p.tokens[kept]):
                pieces.append((new, kept < p.accepted))
            kept += 1
        self.done = p.finished is not None or self.text.stopped
        if self.done:
            pieces.append((self.text.finish(), False))
            g.finish_reason = "stop" if self.text.stopped else p.finished or ""
            g.error = None if self.text.stopped else p.error
        g.token_ids += p.tokens[:kept]
        g.accepted += [k < p.accepted for k in range(kept)]
        g.logprobs += p.logprobs[:kept]
        g.top_logprobs += p.top_logprobs[:kept]
        g.stats.add(p.drafted, p.accepted, kept, p.seconds, disabled=p.disabled)
        return [Chunk(new, accepted, g) for new, accepted in pieces]

    def interrupt(self) -> Chunk:
        """End it here, with the text that was held back: half a stop string is none."""
        self.done, self.generation.finish_reason = True, "interrupted"
        return Chunk(self.text.finish(), False, self.generation)
