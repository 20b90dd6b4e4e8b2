"""What may be asked of an answer besides its prompt: the keyword arguments of `generate`, checked as far as no model is needed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from specdiff.arguments import brief, whole
from specdiff.controller import Controller, draft_length
from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.text.detokenizer import StopStrings
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
    tools: Sequence[Any] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:
            object.__setattr__(self, "seed", whole("seed", self.seed))
        if self.draft_len is not None and not isinstance(self.draft_len, str):
            object.__setattr__(self, "draft_len", whole("draft_len", self.draft_len))
        for name in ("drafter_options", "chat_template_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise UsageError(f"{name} must be a mapping, not {brief(value)}")
        if not isinstance(self.verifier, str):
            raise UsageError(f"verifier must be a name, not {brief(self.verifier)}")
        if not isinstance(self.stop, (str, Sequence)) or isinstance(self.stop, (bytes, bytearray)):
            raise UsageError(f"stop must be a string or a list of strings, not {brief(self.stop)}")
        self.stops()

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Self:
        """Options by name; None stands for the default. `defaults` replace SamplingParams' own.

        Raises UsageError naming what is unknown or bad.
        """
        own = {f.name for f in fields(cls)} - {"sampling"}
        known = SamplingParams.__dataclass_fields__
        unknown = [name for name in options if name not in known and name not in own]
        if unknown:
            raise UsageError(
                f"unknown option {unknown[0]!r}; sampling options are {', '.join(known)}"
            )
        named = {name: value for name, value in options.items() if value is not None}
        sampling = {name: value for name, value in named.items() if name in known}
        rest = {name: value for name, value in named.items() if name in own}
        return cls(SamplingParams(**{**(defaults or {}), **sampling}), **rest)

    def stops(self, special: Collection[str] = ()) -> StopStrings:
        """`special`: the strings of special tokens, which a stop string may hold."""
        return StopStrings(self.stop, include=self.include_stop, special=special)

    def judge(self) -> Verifier:
        """Raises UnknownNameError."""
        return verifier_named(self.verifier)

    def length(self, drafter: Drafter[Any]) -> int | Controller:
        """How long drafts shall be; the drafter's own K with a seed, since "auto" looks at clocks. Raises UsageError."""
        return draft_length(self.draft_len, drafter, steady=self.seed is not None)
