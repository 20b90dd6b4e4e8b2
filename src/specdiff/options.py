"""What may be asked of an answer besides its prompt: the keyword arguments of `generate`, checked as far as no model is needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from specdiff.controller import Controller, draft_length
from specdiff.detokenizer import StopStrings
from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.types import SamplingParams
from specdiff.verify import Verifier
from specdiff.verify import verifier as verifier_named


@dataclass(frozen=True, slots=True)
class Options:
    """See `SpeculativeLM.generate` for what each means."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    verifier: str = "token"
    draft_len: int | str | None = None
    drafter_options: Mapping[str, Any] | None = None
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    include_stop: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises UsageError naming what is unknown or bad."""
        own = {f.name for f in fields(cls)} - {"sampling"}
        chosen = {name: value for name, value in given.items() if name in own}
        seed = chosen.get("seed")
        if seed is not None and not isinstance(seed, int):
            raise UsageError(f"seed must be a whole number, not {seed!r}")
        made = cls(_sampling({name: value for name, value in given.items() if name not in own}), **chosen)
        made.stops()
        return made

    def stops(self) -> StopStrings:
        return StopStrings(self.stop, include=self.include_stop)

    def judge(self) -> Verifier:
        """Raises UnknownNameError."""
        return verifier_named(self.verifier)

    def length(self, drafter: Drafter[Any]) -> int | Controller:
        """How long drafts shall be; the drafter's own K with a seed, since "auto" looks at clocks. Raises UsageError."""
        return draft_length(self.draft_len, drafter, steady=self.seed is not None)


def _sampling(options: Mapping[str, Any]) -> SamplingParams:
    known = SamplingParams.__dataclass_fields__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}; sampling options are {', '.join(known)}")
    bias = options.get("logit_bias", ())
    if isinstance(bias, Mapping):
        options = {**options, "logit_bias": tuple((int(token), float(value)) for token, value in bias.items())}
    return SamplingParams(**options)
