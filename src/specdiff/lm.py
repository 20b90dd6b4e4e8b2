"""Text in, text out: `load()` and SpeculativeLM. Nothing below this room knows about text."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from specdiff import catalog, engine
from specdiff.controller import Controller
from specdiff.detokenizer import Detokenizer
from specdiff.drafters.base import Drafter
from specdiff.drafters.elsewhere import across
from specdiff.errors import ConfigError, DrafterError, UsageError
from specdiff.generation import Answer, Generation, Piece
from specdiff.noise import row_seed
from specdiff.options import Options
from specdiff.targets.base import Target
from specdiff.templates import Renderer, TemplateRefusedError

Prompt = str | Sequence[int]
Message = Mapping[str, str]
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SpeculativeLM:
    """A target, a drafter and a tokenizer. Build it with `specdiff.load`."""

    def __init__(
        self,
        target: Target[Any],
        drafter: str | Drafter[Any],
        tokenizer: Any,
        max_len: int,
        drafter_options: Mapping[str, Any] | None = None,
        drafter_device: torch.device | None = None,
    ) -> None:
        self.place = drafter_device or target.info.device
        self.target, self.tokenizer, self.max_len = target, tokenizer, min(max_len, target.info.max_positions)
        if drafter_options and not isinstance(drafter, str):
            raise UsageError("drafter_options need a drafter given by name; this one was given as an object")
        self.spec = drafter if isinstance(drafter, str) else None
        self.drafter = self._build(drafter, drafter_options)
        self._built = {_key({}): self.drafter, _key(drafter_options or {}): self.drafter}
        self._renderer = Renderer()

    @overload
    def generate(self, prompts: str | Sequence[int], **options: Any) -> Generation: ...
    @overload
    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[Generation]: ...
    def generate(self, prompts: Any, **options: Any) -> Generation | list[Generation]:
        """Answer one prompt, or a list of them (rows are batched; memory is bounded by `rows`).

        A string is a user's turn where the model has a chat template (`raw=True`: plain text); a list of ints is token ids.

        Args:
            max_tokens, temperature, top_k, top_p, min_p, stop_token_ids, repetition_penalty, presence_penalty, frequency_penalty,
                logit_bias, allowed_token_ids, logprobs: see SamplingParams (logit_bias may be a mapping). Answers also end at max_len.
            stop: a string, or up to 16 of at most 256 characters; the text ends before the first one that is complete.
            include_stop: the text ends with it instead.
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
        for index, piece in self._pieces(listed, late=not options.get("stop"), **options):
            generations[index] = piece.generation
            piece.generation.text += piece.text
        return generations[0] if single else generations

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Piece]:
        """Answer one prompt piece by piece; takes what `generate` takes. Joined pieces equal generate's text."""
        for _, piece in self._pieces([prompt], late=False, **options):
            piece.generation.text += piece.text
            yield piece

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

    def _pieces(
        self,
        prompts: Sequence[Prompt],
        *,
        late: bool,
        raw: bool = False,
        system: str | None = None,
        rows: int = 8,
        **options: Any,
    ) -> Iterator[tuple[int, Piece]]:
        """Run the engine; yields each prompt's pieces with its place, the last one when its answer is whole (`late`: only that)."""
        asked = Options.of(options)
        if rows < 1:
            raise UsageError(f"rows must be at least 1, not {rows}")
        answers = [self.answer(asked, late=late) for _ in prompts]
        root = secrets.randbits(63) if asked.seed is None else asked.seed
        requests = [self.request(self.encode(p, raw=raw, system=system), asked, row_seed(root, i)) for i, p in enumerate(prompts)]
        drafter, length = self.drafting(asked)
        engine.check(requests, self.target)
        for turn in engine.serve(self.target, drafter, requests, verifier=asked.judge(), draft_len=length, rows=rows):
            for p in turn.progress():
                answer = answers[p.request]
                yield from ((p.request, piece) for piece in answer.add(p))
                if answer.done:
                    turn.cancel(p.request)

    def answer(self, asked: Options, *, late: bool = False) -> Answer:
        """An empty answer, to be fed with what rounds give (`late`: nobody reads along). Raises UsageError."""
        if asked.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        return Answer(Detokenizer(self._text, asked.stops(), late=late))

    def request(self, ids: list[int], asked: Options, seed: int) -> engine.Request:
        """What the engine is asked for: an answer behind `ids` that ends where the model says so, and at max_len."""
        room = min(asked.sampling.max_tokens, self.max_len - len(ids))
        ends = () if asked.ignore_eos else self.end_ids
        own = replace(asked.sampling, max_tokens=room, stop_token_ids=(*asked.sampling.stop_token_ids, *ends))
        return engine.Request(ids, own, seed)

    def drafting(self, asked: Options) -> tuple[Drafter[Any], int | Controller]:
        """The drafter with the options asked for, and its draft length. Raises UsageError or DrafterError."""
        drafter = self._drafter(asked.drafter_options or {})
        return drafter, asked.length(drafter)

    def _drafter(self, options: Mapping[str, Any]) -> Drafter[Any]:
        key = _key(options)
        if key not in self._built:
            if self.spec is None:
                raise DrafterError("drafter_options need a drafter given by name; this one was given as an object")
            self._built[key] = self._build(self.spec, options)
        return self._built[key]

    def _build(self, drafter: str | Drafter[Any], options: Mapping[str, Any] | None) -> Drafter[Any]:
        info = replace(self.target.info, device=self.place)
        made = catalog.drafter(drafter, info, options) if isinstance(drafter, str) else drafter
        return across(made, self.place, self.target.info.device)

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


def _key(options: Mapping[str, Any]) -> str:
    return json.dumps(dict(options), sort_keys=True, default=str)


def load(
    model: str = catalog.DEFAULT_MODEL,
    drafter: str | Drafter[Any] = "auto",
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_len: int = 2048,
    drafter_options: Mapping[str, Any] | None = None,
    drafter_device: str | None = None,
    model_options: Mapping[str, Any] | None = None,
) -> SpeculativeLM:
    """A model made faster by a drafter.

    Args:
        model: hub id, local folder, file.gguf, or a built-in name (smollm2-135m).
        drafter: "auto" (the bundled one for this target), "none", "sedd", a folder or hub id, "module:Class",
            "./file.py:Class", or a Drafter.
        device: "auto" is CUDA where there is one.  dtype: "auto" is float32 on a CPU, the checkpoint's own elsewhere.
        max_len: most tokens of prompt and answer together.
        drafter_options: keyword arguments of the drafter (steps, order, ...).
        drafter_device: where the drafter runs; None: with the target's embedding. A Drafter given as an object must be there.
        model_options: how the target is loaded, as keyword arguments of transformers' from_pretrained: device_map (then leave
            `device` alone), max_memory, offload_folder, quantization_config, attn_implementation.

    Raises UnknownNameError, ConfigError, WeightsError, UnsupportedModelError or DrafterError, each naming value and fix.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if max_len < 2:
        raise UsageError(f"max_len must be at least 2, not {max_len}")
    if device != "auto" and (model_options or {}).get("device_map") is not None:
        raise UsageError(f"device {device!r} and a device_map in model_options both say where the target goes; give one of them")
    place = _device(device)
    kind = torch.float32 if dtype == "auto" and place.type == "cpu" else DTYPES[dtype]
    where = None if drafter_device is None else _device(drafter_device)
    target, folder = catalog.target(model, kind, place, model_options)
    return SpeculativeLM(target, drafter, tokenizer_of(folder), max_len, drafter_options, where)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device  # with its index: "cuda" is cuda:0, as tensors say it
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not usable here: {str(error).splitlines()[0]}") from None


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
