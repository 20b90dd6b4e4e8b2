"""Answer options: the keyword arguments of `generate`, documented, typed and checked."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypedDict

from specdiff.arguments import brief, whole
from specdiff.controller import Controller, draft_length
from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.profile import Profile
from specdiff.text.detokenizer import StopStrings
from specdiff.text.structured import Format, structure
from specdiff.types import SamplingParams, check_grammar
from specdiff.verify import Verifier
from specdiff.verify import verifier as verifier_named


class TemplateOptions(TypedDict, total=False):
    """Variables of the chat template, as in transformers."""

    tools: Sequence[Any] | None
    """JSON schemas, or functions that transformers can describe as such."""
    documents: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    """Further variables, such as enable_thinking."""


class ChatOptions(TemplateOptions, total=False):
    """Options of `SpeculativeLM.chat` and `Conversation`.

    None selects an option's default. The default of temperature, top_k, top_p, min_p and
    repetition_penalty is the model's own if its generation_config.json has one (`lm.defaults`),
    otherwise that of SamplingParams.
    """

    max_tokens: int | None
    """Maximum number of new tokens (256). Answers also end at `max_len`."""
    temperature: float | None
    """Sampling temperature (1); 0 is greedy."""
    top_k: int | None
    """Sample from the k most likely tokens (0: off)."""
    top_p: float | None
    """Sample from the most likely tokens that add up to this probability (1: off)."""
    min_p: float | None
    """Drop tokens less likely than this fraction of the most likely one (0: off)."""
    stop_token_ids: Collection[int] | None
    """Token ids that end the answer, in addition to the model's own."""
    repetition_penalty: float | None
    """Penalty on the tokens of prompt and answer (1: off)."""
    presence_penalty: float | None
    """Penalty on tokens that occur in the answer (0: off)."""
    frequency_penalty: float | None
    """Penalty on tokens for each occurrence in the answer (0: off)."""
    logit_bias: Mapping[int, float] | Mapping[str, float] | Sequence[tuple[int, float]] | None
    """Values added to the logits of token ids."""
    allowed_token_ids: Collection[int] | None
    """The only token ids to sample from."""
    json_schema: Mapping[str, Any] | str | bool | None
    """The answer is JSON of this schema (`{"type": "object"}`: any object). Structured output is
    one of json_schema, regex, grammar and choice, and needs the extra `structured`."""
    regex: str | None
    """The answer matches this regular expression as a whole (Rust's syntax)."""
    grammar: str | None
    """The answer is derived from this context-free grammar (Lark or GBNF)."""
    choice: Sequence[str] | None
    """The answer is one of these texts."""
    logprobs: int | None
    """Report the logprob of each token, and the N most likely alternatives."""
    stop: str | Sequence[str] | None
    """Stop strings: at most 16, of at most 256 characters each. The text ends before the first one
    that completes. They may contain special tokens, which the text omits."""
    include_stop: bool | None
    """End the text with the stop string instead of before it."""
    ignore_eos: bool | None
    """Continue past the end-of-text tokens."""
    seed: int | None
    """The same seed gives the same tokens (random by default); prompt i uses hash(seed, i)."""
    verifier: str | None
    """"token" (default), "block", "match" or "match-gumbel"."""
    draft_len: int | str | None
    """Draft length, or "auto": drafting is off while it is slower than plain decoding. Default:
    "auto"; with a seed, the drafter's own length, since "auto" depends on timing and only "match"
    is reproducible then."""
    drafter_options: Mapping[str, Any] | None
    """Keyword arguments of the drafter (steps, order, ...), merged into those of `load`."""


class GenerateOptions(ChatOptions, total=False):
    """Options of `SpeculativeLM.generate` and `stream`."""

    raw: bool | None
    """Do not apply the chat template."""
    system: str | None
    """A system prompt."""
    rows: int | None
    """Maximum number of prompts decoded at a time (8)."""


@dataclass(frozen=True, slots=True)
class Options:
    """Checked ChatOptions."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    verifier: str = "token"
    draft_len: int | str | None = None
    drafter_options: Mapping[str, Any] | None = None
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    include_stop: bool = False
    json_schema: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
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
                raise UsageError(f"{name} must be a mapping, not {brief(value)}", param=name)
        if not isinstance(self.verifier, str):
            raise UsageError(
                f"verifier must be a name, not {brief(self.verifier)}", param="verifier"
            )
        if not isinstance(self.stop, (str, Sequence)) or isinstance(self.stop, (bytes, bytearray)):
            raise UsageError(
                f"stop must be a string or a list of strings, not {brief(self.stop)}", param="stop"
            )
        self.stops()
        if self.structure is not None:
            check_grammar(self.sampling)
            if self.ignore_eos:
                raise UsageError(
                    f"ignore_eos cannot be combined with {self.structure[0]}: "
                    "the end of the text ends the structure",
                    param="ignore_eos",
                )

    @property
    def structure(self) -> tuple[Format, Any] | None:
        """The option that asks for structured output, and its value. Raises UsageError."""
        return structure(
            {
                "json_schema": self.json_schema,
                "regex": self.regex,
                "grammar": self.grammar,
                "choice": self.choice,
            }
        )

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Self:
        """Options by name; None selects the default. `defaults` override those of SamplingParams.

        Raises UsageError for an unknown name or a bad value.
        """
        sampling_names = SamplingParams.__dataclass_fields__
        names = {f.name for f in fields(cls)} - {"sampling"}
        sampling = dict(defaults or {})
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in sampling_names and name not in names:
                listing = ", ".join(sampling_names)
                raise UsageError(
                    f"unknown option {name!r}; sampling options are {listing}", param=name
                )
            if value is not None:
                (sampling if name in sampling_names else values)[name] = value
        return cls(SamplingParams(**sampling), **values)

    @property
    def template(self) -> TemplateOptions:
        """The options of the chat template."""
        return TemplateOptions(
            tools=self.tools,
            documents=self.documents,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def stops(self, special: Collection[str] = ()) -> StopStrings:
        """The stop strings. `special`: the special tokens, which they may contain."""
        return StopStrings(self.stop, include=self.include_stop, special=special)

    def build_verifier(self) -> Verifier:
        """The verifier. Raises UnknownNameError."""
        return verifier_named(self.verifier)

    def length(self, drafter: Drafter[Any], profile: Profile) -> int | Controller:
        """The draft length, or the controller that sets it; see `draft_len`. Raises UsageError."""
        steady = self.seed is not None
        greedy = self.sampling.temperature == 0
        return draft_length(self.draft_len, drafter, steady=steady, greedy=greedy, profile=profile)
