"""Text in, text out: `load()` and SpeculativeLM. Nothing below this room knows about text."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch

from specdiff import catalog, engine
from specdiff.controller import Controller
from specdiff.detokenizer import Detokenizer
from specdiff.drafters.base import Drafter
from specdiff.errors import ConfigError, DrafterError, UsageError
from specdiff.noise import row_seed
from specdiff.stats import Stats
from specdiff.targets.base import Target
from specdiff.templates import Renderer, TemplateRefusedError
from specdiff.types import SamplingParams
from specdiff.verify import verifier as verifier_named

Prompt = str | Sequence[int]
Message = Mapping[str, str]
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class Generation:
    """One answer. `accepted[i]`: token i came from the draft. finish_reason: "stop" (end of text or stop id) or "length"."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    finish_reason: str = ""
    stats: Stats = field(default_factory=Stats)


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of streamed text. `accepted`: it came from the draft. `generation` is the answer so far, whole with the last piece."""

    text: str
    accepted: bool
    generation: Generation


class SpeculativeLM:
    """A target, a drafter and a tokenizer. Build it with `specdiff.load`."""

    def __init__(
        self,
        target: Target[Any],
        drafter: str | Drafter[Any],
        tokenizer: Any,
        max_len: int,
        drafter_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.target, self.tokenizer, self.max_len = target, tokenizer, min(max_len, target.info.max_positions)
        if drafter_options and not isinstance(drafter, str):
            raise UsageError("drafter_options need a drafter given by name; this one was given as an object")
        self.spec = drafter if isinstance(drafter, str) else None
        self.drafter = catalog.drafter(drafter, target.info, drafter_options) if isinstance(drafter, str) else drafter
        self._built: dict[str, Drafter[Any]] = {"{}": self.drafter}
        self._renderer = Renderer()

    @overload
    def generate(self, prompts: str | Sequence[int], **options: Any) -> Generation: ...
    @overload
    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[Generation]: ...
    def generate(self, prompts: Any, **options: Any) -> Generation | list[Generation]:
        """Answer one prompt, or a list of them (rows are batched; memory is bounded by `rows`).

        A string is a user's turn where the model has a chat template (`raw=True`: plain text); a list of ints is token ids.

        Args:
            max_tokens, temperature, top_k, top_p, min_p, stop_token_ids: see SamplingParams. Answers also end at max_len.
            seed: same seed, same tokens (row i of a list uses hash(seed, i)). None: a fresh one.
            verifier: "token", "block", "match" or "match-gumbel".
            draft_len: K, "auto" (drafting is off while it does not pay), or None: "auto", but the drafter's own K where a
                seed is given, because "auto" looks at clocks and only `match` is reproducible then.
            drafter_options: keyword arguments of the drafter (steps, order, ...).
            ignore_eos: go on past the end of text.  raw: no chat template.  system: a system prompt.
            rows: most prompts decoded at a time.

        Raises UsageError naming the bad value and what is allowed.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        listed: Sequence[Prompt] = [prompts] if single else prompts
        generations = [Generation() for _ in listed]
        for index, _, finished in self._progress(listed, generations, **options):
            if finished:
                done = generations[index]
                done.text = self._text(done.token_ids)
        return generations[0] if single else generations

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Piece]:
        """Answer one prompt piece by piece; takes what `generate` takes. Joined pieces equal generate's text."""
        generation = Generation()
        text = Detokenizer(self._text)
        for _, new, finished in self._progress([prompt], [generation], **options):
            for token, accepted in new:
                if piece := text.add(token):
                    generation.text += piece
                    yield Piece(piece, accepted, generation)
            if finished:
                rest = text.finish()
                generation.text += rest
                yield Piece(rest, False, generation)

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """Answer a conversation of {"role", "content"} messages through the model's chat template."""
        return self.generate(self.render(messages), **options)

    def render(self, messages: Sequence[Message], *, answered: bool = False) -> list[int]:
        """The token ids of a conversation, up to where the answer begins (`answered`: it ends with one, and so does the text).

        Raises UsageError without a chat template.
        """
        tokenizer = self._tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("this model has no chat template; give a plain prompt with raw=True")
        if isinstance(messages, str) or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
            raise UsageError('messages must be a list of {"role": ..., "content": ...}')
        try:
            template, tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map
            text = self._renderer.render(template, messages, prompt=not answered, tokens=tokens)
        except (TemplateRefusedError, ValueError) as error:
            raise UsageError(f"the model's chat template refuses these messages ({error})") from error
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    def encode(self, prompt: Prompt, *, raw: bool = False, system: str | None = None) -> list[int]:
        """Token ids of a prompt, as `generate` would read it. Raises UsageError if there are none, too many, or unknown ones."""
        if not isinstance(prompt, str):
            ids = [int(i) for i in prompt]
            bad = next((i for i in ids if not 0 <= i < self.target.info.vocab_size), None)
            if bad is not None:
                raise UsageError(f"token id {bad} is outside the target's vocabulary of {self.target.info.vocab_size}")
        elif raw or not getattr(self._tokenizer(), "chat_template", None):
            if system is not None:
                raise UsageError("a system prompt needs a chat template; put it into the prompt itself")
            ids = [int(i) for i in self._tokenizer()(prompt)["input_ids"]]
        else:
            messages = [{"role": "system", "content": system}] if system is not None else []
            ids = self.render([*messages, {"role": "user", "content": prompt}])
        if not ids:
            raise UsageError("the prompt holds no tokens; give at least one")
        if len(ids) >= self.max_len:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, which leaves none to generate within max_len {self.max_len}; shorten it or raise "
                f"max_len (the model's own limit is {self.target.info.max_positions})"
            )
        return ids

    def _progress(
        self,
        prompts: Sequence[Prompt],
        generations: Sequence[Generation],
        *,
        seed: int | None = None,
        verifier: str = "token",
        draft_len: int | str | None = None,
        drafter_options: Mapping[str, Any] | None = None,
        ignore_eos: bool = False,
        raw: bool = False,
        system: str | None = None,
        rows: int = 8,
        **sampling: Any,
    ) -> Iterator[tuple[int, list[tuple[int, bool]], bool]]:
        """Run the engine and fold its progress into `generations`; yields (prompt, new (token, accepted) pairs, finished)."""
        if seed is not None and not isinstance(seed, int):
            raise UsageError(f"seed must be a whole number, not {seed!r}")
        if rows < 1:
            raise UsageError(f"rows must be at least 1, not {rows}")
        params = _sampling(sampling)
        stop = () if ignore_eos else self.end_ids
        root = secrets.randbits(63) if seed is None else seed
        requests = []
        for i, prompt in enumerate(prompts):
            ids = self.encode(prompt, raw=raw, system=system)
            room = min(params.max_tokens, self.max_len - len(ids))
            own = SamplingParams(room, params.temperature, params.top_k, params.top_p, params.min_p, (*params.stop_token_ids, *stop))
            requests.append(engine.Request(ids, own, row_seed(root, i)))
        drafter = self._drafter(drafter_options or {})
        length = _draft_length(draft_len, drafter, seeded=seed is not None)
        for p in engine.run(self.target, drafter, requests, verifier=verifier_named(verifier), draft_len=length, rows=rows):
            g = generations[p.request]
            new = [(token, k < p.accepted) for k, token in enumerate(p.tokens)]
            g.token_ids += p.tokens
            g.accepted += [accepted for _, accepted in new]
            g.stats.add(p.drafted, p.accepted, len(p.tokens), p.seconds)
            g.finish_reason = p.finished or ""
            yield p.request, new, p.finished is not None

    def _drafter(self, options: Mapping[str, Any]) -> Drafter[Any]:
        key = json.dumps(dict(options), sort_keys=True, default=str)
        if key not in self._built:
            if self.spec is None:
                raise DrafterError("drafter_options need a drafter given by name; this one was given as an object")
            self._built[key] = catalog.drafter(self.spec, self.target.info, options)
        return self._built[key]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token ids that end an answer, as model and tokenizer name them."""
        model = getattr(self.target, "model", None)
        ends: set[int] = set()
        for source in (getattr(model, "generation_config", None), getattr(model, "config", None), self.tokenizer):
            end = getattr(source, "eos_token_id", None)
            ends |= set(end) if isinstance(end, list) else {end} if isinstance(end, int) else set()
        return tuple(sorted(ends))

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UsageError("this model has no tokenizer; give prompts as lists of token ids")
        return self.tokenizer

    def _text(self, ids: Sequence[int]) -> str:
        return (
            "" if self.tokenizer is None else str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        )


def _sampling(options: Mapping[str, Any]) -> SamplingParams:
    known = SamplingParams.__dataclass_fields__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}; sampling options are {', '.join(known)}")
    return SamplingParams(**options)


def _draft_length(given: int | str | None, drafter: Drafter[Any], seeded: bool) -> int | Controller:
    if given not in (None, "auto") and not isinstance(given, int):
        raise UsageError(f"draft_len must be a whole number of at least 1 or 'auto', not {given!r}")
    if isinstance(given, int) and given < 1:
        raise UsageError(f"draft_len must be at least 1, not {given}; for plain decoding use the drafter 'none'")
    if drafter.draft_len == 0:
        return 0
    if given == "auto" or (given is None and not seeded):
        return Controller(drafter.draft_len)
    return drafter.draft_len if given is None else int(given)


def load(
    model: str = catalog.DEFAULT_MODEL,
    drafter: str | Drafter[Any] = "auto",
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_len: int = 2048,
    drafter_options: Mapping[str, Any] | None = None,
) -> SpeculativeLM:
    """A model made faster by a drafter.

    Args:
        model: hub id, local folder, file.gguf, or a built-in name (smollm2-135m).
        drafter: "auto" (the bundled one for this target), "none", "sedd", a folder or hub id, "module:Class",
            "./file.py:Class", or a Drafter.
        device: "auto" is CUDA where there is one.  dtype: "auto" is float32 on a CPU, the checkpoint's own elsewhere.
        max_len: most tokens of prompt and answer together.

    Raises UnknownNameError, ConfigError, WeightsError, UnsupportedModelError or DrafterError, each naming value and fix.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if max_len < 2:
        raise UsageError(f"max_len must be at least 2, not {max_len}")
    place = _device(device)
    kind = torch.float32 if dtype == "auto" and place.type == "cpu" else DTYPES[dtype]
    target, folder = catalog.target(model, kind, place)
    return SpeculativeLM(target, drafter, tokenizer_of(folder), max_len, drafter_options)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not usable here: {str(error).splitlines()[0]}") from None
    return place


def tokenizer_of(folder: Path | str) -> Any:
    """The tokenizer a model's folder or hub id holds; None without one. Raises ConfigError if it is damaged."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return found if found.vocab_size else None  # for some families transformers makes an empty one up, with an end token of its own
    except (OSError, ValueError, KeyError, TypeError) as error:
        present = [p.name for p in Path(folder).glob("*token*.json")]
        if present:
            raise ConfigError(f"{folder}: the tokenizer ({', '.join(sorted(present))}) cannot be read: {error}") from error
        return None  # token ids work without one; text prompts then say what is missing
