"""Text in, text out: `load()` and SpeculativeLM. Nothing below this room knows about text."""

import json
import os
import secrets
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, overload

import torch

from specdiff import catalog, engine
from specdiff.arguments import brief, plain, token_ids, whole
from specdiff.controller import Controller
from specdiff.drafters.base import Drafter
from specdiff.drafters.on_device import across
from specdiff.errors import ConfigError, DrafterError, UsageError
from specdiff.noise import row_seed
from specdiff.targets.base import Target
from specdiff.text import defaults
from specdiff.text.detokenizer import Detokenizer
from specdiff.text.generation import Answer, Chunk, Generation, demand_whole
from specdiff.text.messages import ChatTemplate, Message, template_variables
from specdiff.text.options import Options
from specdiff.unicode import valid

Prompt = str | Sequence[int]
DRAFTERS = 8  # most drafters with options of a request's own that are kept; the least recently used goes first
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.place = drafter_device or target.info.device
        self.target, self.tokenizer, self.max_len = (
            target,
            tokenizer,
            min(max_len, target.info.max_positions),
        )
        self.defaults = dict(sampling_defaults or {})
        if drafter_options and not isinstance(drafter, str):
            raise UsageError(
                "drafter_options need a drafter given by name; this one was given as an object"
            )
        self.spec = drafter if isinstance(drafter, str) else None
        self.drafter_options = dict(drafter_options or {})
        self.drafter = self._build(drafter, self.drafter_options)
        self._drafters: OrderedDict[str, Drafter[Any]] = OrderedDict()
        self._lock = threading.Lock()

    @overload
    def generate(self, prompts: str | Sequence[int], **options: Any) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Any
    ) -> list[Generation]: ...
    def generate(self, prompts: Any, **options: Any) -> Generation | list[Generation]:
        """Answer one prompt, or a list of them (rows are batched; memory is bounded by `rows`).

        A string is a user's turn where the model has a chat template (`raw=True`: plain text); a list, array or tensor of
        whole numbers is token ids, and so is a tokenizer's encoding. What a turn holds is text: control tokens spelled in it
        are encoded as ordinary text (in raw text they are control tokens).

        None stands for an option's default. That of temperature, top_k, top_p, min_p and repetition_penalty is the model's
        own, where its generation_config.json names one (`defaults`), else SamplingParams'.

        Args:
            max_tokens, temperature, top_k, top_p, min_p, stop_token_ids, repetition_penalty, presence_penalty, frequency_penalty,
                logit_bias, allowed_token_ids, logprobs: see SamplingParams (logit_bias may be a mapping). Answers also end at max_len.
            stop: a string, or up to 16 of at most 256 characters; the text ends before the first one that is complete.
                Special tokens in it are met too, though the text leaves them out.
            include_stop: the text ends with it instead.
            seed: same seed, same tokens (row i of a list uses hash(seed, i)). None: a fresh one.
            verifier: "token", "block", "match" or "match-gumbel".
            draft_len: K, "auto" (drafting is off while it does not pay), or None: "auto", but the drafter's own K where a
                seed is given, because "auto" looks at clocks and only `match` is reproducible then.
            drafter_options: keyword arguments of the drafter (steps, order, ...), added to those of `load`.
            ignore_eos: go on past the end of text.  raw: no chat template.  system: a system prompt.
            tools, documents, chat_template_kwargs: variables of the chat template, as in transformers.
            rows: most prompts decoded at a time.

        Raises UsageError naming the bad value and what is allowed, and TargetError, whose `generations` are all answers, if
        the target fails under one.
        """
        single, listed = _listed(prompts)
        generations = [Generation() for _ in listed]
        for index, piece in self._pieces(listed, late=not options.get("stop"), **options):
            generations[index] = piece.generation
            piece.generation.text += piece.text
        demand_whole(generations)
        return generations[0] if single else generations

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Answer one prompt piece by piece; takes what `generate` takes. Joined pieces equal generate's text."""
        single, listed = _listed(prompt)
        if not single and len(listed) != 1:
            raise UsageError(f"a stream answers one prompt, not {len(listed)}")
        for _, piece in self._pieces(listed, late=False, **options):
            piece.generation.text += piece.text
            yield piece
            demand_whole([piece.generation])

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generation:
        """Answer a conversation of {"role", "content"} messages through the model's chat template.

        A last message of the assistant's is continued. Further options are generate's.
        """
        ids = self.render(
            messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs
        )
        return self.generate(ids, **options)

    def render(
        self,
        messages: Sequence[Message],
        *,
        answered: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation, up to where the answer begins (`answered`: it ends with one, and so does the text).

        Content is a string or a list of text parts, and is text: control tokens spelled in it are encoded as ordinary text.
        A last message of the assistant's is left open, so that the answer continues it.

        Raises UsageError without a chat template, and for messages the template refuses.
        """
        template = self._template
        if template is None:
            raise UsageError("this model has no chat template; give a plain prompt with raw=True")
        variables = template_variables(tools, documents, chat_template_kwargs)
        return self._known(
            template.encode(messages, answered=answered, variables=variables), "the tokenizer"
        )

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a prompt, as `generate` would read it. Raises UsageError if there are none, too many, or unknown ones."""
        if system is not None and not isinstance(system, str):
            raise UsageError(f"system must be a string, not {brief(system)}")
        if isinstance(prompt, str) and not raw and self._template is not None:
            self._warn_of_control_tokens(prompt)
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": prompt})
            ids = self.render(
                messages,
                tools=tools,
                documents=documents,
                chat_template_kwargs=chat_template_kwargs,
            )
        else:
            variables = {
                "tools": tools,
                "documents": documents,
                "chat_template_kwargs": chat_template_kwargs,
            }
            unread = [name for name, value in variables.items() if value is not None]
            if unread:
                raise UsageError(
                    f"{unread[0]} needs a chat template, which raw text and token ids do not pass"
                )
            if system is not None and isinstance(prompt, str):
                raise UsageError(
                    "a system prompt needs a chat template; put it into the prompt itself"
                )
            ids = (
                self.raw_ids(prompt)
                if isinstance(prompt, str)
                else self._known(token_ids("a prompt", prompt), "the prompt")
            )
        if not ids:
            raise UsageError("the prompt holds no tokens; give at least one")
        if len(ids) >= self.max_len:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, which leaves none to generate within max_len {self.max_len}; shorten it or raise "
                f"max_len (the model's own limit is {self.target.info.max_positions})"
            )
        return ids

    def _warn_of_control_tokens(self, prompt: str) -> None:
        template = self._chat_template
        spelled = template.spelled(prompt)
        rendered = spelled & template.markers if spelled else spelled
        if rendered:
            warnings.warn(
                f"the prompt spells the control token {min(rendered)!r}, which is read as ordinary text; "
                "give a prompt that is rendered already with raw=True",
                stacklevel=3,
            )

    def raw_ids(self, text: str) -> list[int]:
        """Plain text as the tokenizer reads it, of any length, but for a second beginning of text.

        Raises UsageError without a tokenizer, and for tokens that the target does not have.
        """
        tokenizer = self._tokenizer()
        ids = [int(i) for i in tokenizer(valid(text), verbose=False)["input_ids"]]
        begin = tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin] and text.startswith(tokenizer.bos_token):
            name = tokenizer.bos_token
            warnings.warn(
                f"the prompt begins with {name!r}, which the tokenizer adds itself: it is taken once",
                stacklevel=3,
            )
            ids = ids[1:]
        return self._known(ids, "the tokenizer")

    def _known(self, ids: list[int], source: str) -> list[int]:
        size = self.target.info.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            token = next(i for i in ids if not 0 <= i < size)
            error = f"token id {token} is outside the target's vocabulary of {size}"
            if source == "the tokenizer":
                name = self.tokenizer.convert_ids_to_tokens(token)
                error = f"the tokenizer gives {name!r} the {error}: it is another model's, or the model was not resized for it"
            raise UsageError(error)
        return ids

    def _pieces(
        self,
        prompts: Sequence[Prompt],
        *,
        late: bool,
        raw: bool | None = None,
        system: str | None = None,
        rows: int | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Chunk]]:
        """Run the engine; yields each prompt's pieces with its place, the last one when its answer is whole (`late`: only that)."""
        asked = Options.of(options, self.defaults)
        rows = 8 if rows is None else whole("rows", rows)
        if rows < 1:
            raise UsageError(f"rows must be at least 1, not {rows}")
        answers = [self.answer(asked, late=late) for _ in prompts]
        root = secrets.randbits(63) if asked.seed is None else asked.seed
        requests = [
            self.request(
                self.encode(
                    prompt,
                    raw=bool(raw),
                    system=system,
                    tools=asked.tools,
                    documents=asked.documents,
                    chat_template_kwargs=asked.chat_template_kwargs,
                ),
                asked,
                row_seed(root, i),
            )
            for i, prompt in enumerate(prompts)
        ]
        drafter, length = self.drafting(asked)
        engine.check(requests, self.target)
        for turn in engine.serve(
            self.target, drafter, requests, verifier=asked.judge(), draft_len=length, rows=rows
        ):
            for p in turn.progress():
                answer = answers[p.request]
                yield from ((p.request, piece) for piece in answer.add(p))
                if answer.done:
                    turn.cancel(p.request)

    def answer(self, asked: Options, *, late: bool = False) -> Answer:
        """An empty answer, to be fed with what rounds give (`late`: nobody reads along). Raises UsageError."""
        if asked.stop and self.tokenizer is None:
            raise UsageError(
                "stop strings need a tokenizer, and this model has none; use stop_token_ids"
            )
        special, byte_tokens = self._unshown
        stops = asked.stops(special.values())
        return Answer(
            Detokenizer(self._text, stops, late=late, special=special, byte_tokens=byte_tokens)
        )

    def request(self, ids: list[int], asked: Options, seed: int) -> engine.Request:
        """What the engine is asked for: an answer behind `ids` that ends where the model says so, and at max_len."""
        room = min(asked.sampling.max_tokens, self.max_len - len(ids))
        ends = () if asked.ignore_eos else self.end_ids
        own = replace(
            asked.sampling, max_tokens=room, stop_token_ids=(*asked.sampling.stop_token_ids, *ends)
        )
        return engine.Request(ids, own, seed)

    def drafting(self, asked: Options) -> tuple[Drafter[Any], int | Controller]:
        """The drafter with the options asked for, and its draft length. Raises UsageError or DrafterError."""
        drafter = self._drafter(asked.drafter_options or {})
        return drafter, asked.length(drafter)

    def _drafter(self, options: Mapping[str, Any]) -> Drafter[Any]:
        merged = {**self.drafter_options, **options}
        if merged == self.drafter_options:
            return self.drafter
        if self.spec is None:
            raise DrafterError(
                "drafter_options need a drafter given by name; this one was given as an object"
            )
        key = json.dumps(merged, sort_keys=True, default=str)
        with self._lock:
            drafter = self._drafters.get(key)
        if (
            drafter is None
        ):  # built without the lock: it takes long, and a process may fork meanwhile
            drafter = self._build(self.spec, merged)
        with self._lock:
            drafter = self._drafters.setdefault(key, drafter)
            self._drafters.move_to_end(key)
            if len(self._drafters) > DRAFTERS:
                self._drafters.popitem(last=False)
        return drafter

    def _build(
        self, drafter: str | Drafter[Any], options: Mapping[str, Any] | None
    ) -> Drafter[Any]:
        info = replace(self.target.info, device=self.place)
        made = catalog.drafter(drafter, info, options) if isinstance(drafter, str) else drafter
        return across(made, self.place, self.target.info.device)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token ids that end an answer: see `defaults.end_ids`."""
        return defaults.end_ids(getattr(self.target, "model", None), self.tokenizer)

    @property
    def _template(self) -> ChatTemplate | None:
        tokenizer = self._tokenizer()
        return self._chat_template if getattr(tokenizer, "chat_template", None) else None

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def _unshown(self) -> tuple[Mapping[int, str], frozenset[int]]:
        """The special tokens, which text leaves out, and the byte-fallback tokens."""
        if self.tokenizer is None:
            return {}, frozenset()
        tokenizer = self.tokenizer
        added = {
            token: entry.content
            for token, entry in tokenizer.added_tokens_decoder.items()
            if entry.special
        }
        special = {
            **added,
            **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)),
        }
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = tokenizer.convert_tokens_to_ids(names)
        return special, frozenset(i for i in ids if i is not None and i != tokenizer.unk_token_id)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UsageError("this model has no tokenizer; give prompts as lists of token ids")
        return self.tokenizer

    def _text(self, ids: Sequence[int]) -> str:
        return (
            ""
            if self.tokenizer is None
            else str(
                self.tokenizer.decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            )
        )


def _listed(prompts: Any) -> tuple[bool, list[Any]]:
    """Whether it is one prompt, and the prompts. Raises UsageError for what is none."""
    prompts = plain(_encoded(prompts) if isinstance(prompts, Mapping) else prompts)
    if isinstance(prompts, str):
        return True, [prompts]
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Sequence):
        kinds = "a string, token ids, or a list of either"
        raise UsageError(
            f"a prompt must be {kinds}, not {type(prompts).__name__} ({brief(prompts)})"
        )
    if len(prompts) > 0 and isinstance(plain(prompts[0]), Real):
        return True, [prompts]
    return False, [
        _encoded(prompt) if isinstance(prompt, Mapping) else prompt for prompt in prompts
    ]


def _encoded(encoding: Mapping[str, Any]) -> list[Any]:
    """The token ids of a tokenizer's encoding, without its padding."""
    if "input_ids" not in encoding:
        names = ", ".join(map(str, encoding)) or "nothing"
        raise UsageError(f"a prompt given as a mapping must hold input_ids, not {names}")
    ids = [plain(entry) for entry in plain(encoding["input_ids"])]
    mask = encoding.get("attention_mask")
    if mask is None:
        return ids
    mask = [plain(entry) for entry in plain(mask)]
    if ids and isinstance(ids[0], list):
        return [_unpadded(row, kept) for row, kept in zip(ids, mask, strict=True)]
    return _unpadded(ids, mask)


def _unpadded(ids: list[Any], mask: list[Any]) -> list[Any]:
    return [token for token, kept in zip(ids, mask, strict=True) if kept]


def _demand_name_or_path(name: str, value: Any) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{name} must be a name or a path, not {brief(value)}")


def load(
    model: str | os.PathLike[str] = catalog.DEFAULT_MODEL,
    drafter: str | os.PathLike[str] | Drafter[Any] = "auto",
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_len: int = 2048,
    drafter_options: Mapping[str, Any] | None = None,
    drafter_device: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    generation_config: str = "auto",
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
        generation_config: "auto": where the model's generation_config.json names temperature, top_k, top_p, min_p or
            repetition_penalty, they are the defaults of requests (do_sample is not asked; vLLM does the same). "none": they are
            SamplingParams' whatever it says.

    Raises UnknownNameError, ConfigError, WeightsError, UnsupportedModelError or DrafterError, each naming value and fix.
    """
    _demand_name_or_path("model", model)
    if not isinstance(drafter, (str, Drafter)):
        _demand_name_or_path("drafter", drafter)
        drafter = os.fspath(
            Path(drafter).expanduser().absolute()
        )  # a path is never a built-in name
    if generation_config not in ("auto", "none"):
        raise UsageError(
            f"unknown generation_config {generation_config!r}; known are auto and none"
        )
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    max_len = whole("max_len", max_len)
    if max_len < 2:
        raise UsageError(f"max_len must be at least 2, not {max_len}")
    if device != "auto" and (model_options or {}).get("device_map") is not None:
        raise UsageError(
            f"device {device!r} and a device_map in model_options both say where the target goes; give one of them"
        )
    place = _device(device)
    kind = torch.float32 if dtype == "auto" and place.type == "cpu" else DTYPES[dtype]
    where = None if drafter_device is None else _device(drafter_device)
    target, folder = catalog.target(model, kind, place, model_options)
    network = getattr(target, "model", None)
    sampling = defaults.sampling_defaults(network) if generation_config == "auto" else {}
    lm = SpeculativeLM(
        target, drafter, tokenizer_of(folder), max_len, drafter_options, where, sampling
    )
    generation = getattr(network, "generation_config", None)
    if generation is not None and generation.eos_token_id is None and lm.end_ids:
        generation.eos_token_id = [
            *lm.end_ids
        ]  # so that transformers' own generate ends where this one does
    return lm


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(
            0, device=name
        ).device  # with its index: "cuda" is cuda:0, as tensors say it
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} is not usable here: {str(error).splitlines()[0]}"
        ) from None


def tokenizer_of(folder: Path | str) -> Any:
    """The tokenizer a model's folder or hub id holds; None without one. Raises ConfigError if it is damaged."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return (
            found if found.vocab_size else None
        )  # for some families transformers makes an empty one up, with an end token of its own
    except (OSError, ValueError, KeyError, TypeError) as error:
        present = [p.name for p in Path(folder).glob("*token*.json")]
        if present:
            raise ConfigError(
                f"{folder}: the tokenizer ({', '.join(sorted(present))}) cannot be read: {error}"
            ) from error
        return None  # token ids work without one; text prompts then say what is missing
