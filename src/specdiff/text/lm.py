"""SpeculativeLM: a target, a drafter and a tokenizer; text in, text out."""

import json
import secrets
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Unpack, overload

import torch

from specdiff import catalog, engine
from specdiff.arguments import brief, token_ids, whole
from specdiff.calibration import calibrate
from specdiff.controller import Controller, free_of_drafts, profile_of
from specdiff.drafters.base import Drafter
from specdiff.drafters.on_device import across
from specdiff.errors import DrafterError, UsageError
from specdiff.grammar import Grammar
from specdiff.noise import row_seed
from specdiff.profile import Profile
from specdiff.targets.base import Target
from specdiff.text import defaults
from specdiff.text.detokenizer import Detokenizer, hidden_tokens
from specdiff.text.generation import (
    Answer,
    Chunk,
    Generation,
    checked_chunks,
    fold,
    raise_if_failed,
)
from specdiff.text.messages import ChatTemplate, Message, template_variables
from specdiff.text.options import ChatOptions, GenerateOptions, Options, TemplateOptions
from specdiff.text.prompts import Prompt, prompt_list
from specdiff.text.structured import GrammarCompiler
from specdiff.unicode import valid

MAX_CACHED_DRAFTERS = 8  # with options of their own; the least recently used is dropped


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
        self.target = target
        self.tokenizer = tokenizer
        self.max_len = min(max_len, target.info.max_positions)
        self.drafter_device = drafter_device or target.info.device
        self.defaults = dict(sampling_defaults or {})
        if drafter_options and not isinstance(drafter, str):
            raise UsageError(
                "drafter_options need a drafter given by name; this one was given as an object",
                param="drafter_options",
            )
        self.spec = drafter if isinstance(drafter, str) else None
        self.drafter_options = dict(drafter_options or {})
        self.drafter = self._build(drafter, self.drafter_options)
        self.profile = profile_of(self.drafter)
        self._drafters: OrderedDict[str, tuple[Drafter[Any], Profile]] = OrderedDict()
        self._lock = threading.Lock()

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self, prompts: str | Sequence[int], **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...
    def generate(
        self, prompts: Any, **options: Unpack[GenerateOptions]
    ) -> Generation | list[Generation]:
        """Answer one prompt, or a list of them in batches of `rows`.

        A string is a user message if the model has a chat template (`raw=True`: plain text); a
        list, array or tensor of integers is token ids, and so is a tokenizer's encoding. Control
        tokens spelled in a message are encoded as ordinary text; in raw text they are control
        tokens.

        Every option is documented in `specdiff.text.options.GenerateOptions`.

        Raises UsageError naming the bad value and what is allowed, and TargetError, whose
        `generations` holds all answers, if the target fails during one.
        """
        items, single = prompt_list(prompts)
        chunks = self._start(items, options, late=not options.get("stop"))
        generations = [Generation() for _ in items]
        for index, chunk in chunks:
            generations[index] = chunk.generation
        raise_if_failed(generations)
        return generations[0] if single else generations

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """Answer one prompt chunk by chunk; the joined chunks equal the text of `generate`.

        Takes the options of `generate`. A bad prompt or option raises here, before the iterator is
        returned; a target that fails raises TargetError while it is read.
        """
        items, single = prompt_list(prompt)
        if not single and len(items) != 1:
            raise UsageError(f"a stream answers one prompt, not {len(items)}", param="prompt")
        return checked_chunks(self._start(items, options, late=False))

    def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Generation:
        """Answer a conversation of {"role", "content"} messages through the chat template.

        A final assistant message is continued.
        """
        ids = self.render(
            messages,
            tools=options.pop("tools", None),
            documents=options.pop("documents", None),
            chat_template_kwargs=options.pop("chat_template_kwargs", None),
        )
        return self.generate(ids, **options)

    def render(
        self,
        messages: Sequence[Message],
        *,
        answered: bool = False,
        **template_options: Unpack[TemplateOptions],
    ) -> list[int]:
        """The token ids of a conversation, up to where the answer begins.

        Content is a string or a list of text parts; control tokens spelled in it are encoded as
        ordinary text. A final assistant message is left open, so that the answer continues it;
        with `answered` the conversation is complete, and the ids end with its last message.

        Raises UsageError without a chat template, and for messages the template refuses.
        """
        template = self._template
        if template is None:
            raise UsageError("this model has no chat template; give a plain prompt with raw=True")
        variables = template_variables(**template_options)
        ids = template.encode(messages, answered=answered, variables=variables)
        return self._in_vocabulary(ids, "the tokenizer")

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        system: str | None = None,
        **template_options: Unpack[TemplateOptions],
    ) -> list[int]:
        """The token ids of a prompt, as `generate` reads it.

        Raises UsageError if there are none, too many, or unknown ones.
        """
        if system is not None and not isinstance(system, str):
            raise UsageError(f"system must be a string, not {brief(system)}", param="system")
        if isinstance(prompt, str) and not raw and self._template is not None:
            self._chat_template.warn_of_control_tokens(prompt)
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": prompt})
            ids = self.render(messages, **template_options)
        else:
            self._reject_template_options(prompt, system, template_options)
            if isinstance(prompt, str):
                ids = self.raw_ids(prompt)
            else:
                ids = self._in_vocabulary(token_ids("prompt", prompt), "the prompt")
        if not ids:
            raise UsageError("the prompt holds no tokens; give at least one", param="prompt")
        if len(ids) >= self.max_len:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, which leaves none to generate within max_len "
                f"{self.max_len}; shorten it or raise max_len (the model's own limit is "
                f"{self.target.info.max_positions})",
                param="prompt",
            )
        return ids

    def raw_ids(self, text: str) -> list[int]:
        """The token ids of plain text of any length, without a doubled beginning-of-text token.

        Raises UsageError without a tokenizer, and for tokens outside the target's vocabulary.
        """
        tokenizer = self._tokenizer()
        ids = [int(i) for i in tokenizer(valid(text), verbose=False)["input_ids"]]
        begin = tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin] and text.startswith(tokenizer.bos_token):
            name = tokenizer.bos_token
            warnings.warn(
                f"the prompt begins with {name!r}, which the tokenizer adds itself: "
                "it is used once",
                stacklevel=3,
            )
            ids = ids[1:]
        return self._in_vocabulary(ids, "the tokenizer")

    def answer(self, options: Options, *, late: bool = False) -> Answer:
        """An empty answer, to which the engine's outputs are added; see Detokenizer for `late`.

        Raises UsageError for stop strings without a tokenizer.
        """
        if options.stop and self.tokenizer is None:
            raise UsageError(
                "stop strings need a tokenizer, and this model has none; use stop_token_ids",
                param="stop",
            )
        special, byte_tokens = self._hidden_tokens
        stops = options.stops(special.values())
        return Answer(
            Detokenizer(self._text, stops, late=late, special=special, byte_tokens=byte_tokens)
        )

    def request(self, ids: list[int], options: Options, seed: int) -> engine.Request:
        """The engine's request: an answer to `ids`, up to an end id of the model or max_len.

        Raises UsageError for a grammar that does not compile.
        """
        sampling = options.sampling
        ends = () if options.ignore_eos else self.end_ids
        params = replace(
            sampling,
            max_tokens=min(sampling.max_tokens, self.max_len - len(ids)),
            stop_token_ids=(*sampling.stop_token_ids, *ends),
        )
        return engine.Request(ids, params, seed, grammar=self._grammar(options))

    def calibrate(self) -> None:
        """Time a few rounds, for 0.3 seconds at most.

        `draft_len="auto"` then knows their costs before the first request. `specdiff.load` does
        this already.
        """
        calibrate(self.target, self.drafter, self.profile)

    def drafting(self, options: Options) -> tuple[Drafter[Any], int | Controller]:
        """The drafter with its options, and its draft length. Raises UsageError or DrafterError."""
        drafter, profile = self._drafter(options.drafter_options or {})
        free = free_of_drafts(options.verifier, greedy=options.sampling.temperature == 0)
        if options.seed is not None and not drafter.reproducible and not free:
            raise UsageError(
                f"a seed gives no reproducible text under verifier {options.verifier!r} with a "
                "drafter that remembers earlier requests; use verifier 'match', temperature 0, "
                "or memory 0",
                param="seed",
            )
        return drafter, options.length(drafter, profile)

    def wait_for_compilation(self) -> bool:
        """Wait for the layers that `load(..., compile=True)` compiles in the background.

        Returns whether all of them are in use; until then, and without them, decoding is eager.
        """
        compilation = getattr(self.target, "compilation", None)
        return compilation is not None and compilation.wait()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token ids that end an answer: see `defaults.end_ids`."""
        return defaults.end_ids(getattr(self.target, "model", None), self.tokenizer)

    def _start(
        self, prompts: Sequence[Prompt], keywords: GenerateOptions, *, late: bool
    ) -> Iterator[tuple[int, Chunk]]:
        """Check and encode everything; the chunks of each prompt, with its index, follow lazily."""
        raw = bool(keywords.pop("raw", None))
        system = keywords.pop("system", None)
        limit = keywords.pop("rows", None)
        options = Options.of(keywords, self.defaults)
        rows = 8 if limit is None else whole("rows", limit)
        if rows < 1:
            raise UsageError(f"rows must be at least 1, not {rows}", param="rows")
        answers = [self.answer(options, late=late) for _ in prompts]
        root = secrets.randbits(63) if options.seed is None else options.seed
        requests = []
        for i, prompt in enumerate(prompts):
            ids = self.encode(prompt, raw=raw, system=system, **options.template)
            requests.append(self.request(ids, options, row_seed(root, i)))
        drafter, length = self.drafting(options)
        verifier = options.build_verifier()
        steps = engine.serve(
            self.target, drafter, requests, verifier=verifier, draft_len=length, rows=rows
        )
        return fold(steps, answers)

    def _reject_template_options(
        self, prompt: Prompt, system: str | None, template_options: TemplateOptions
    ) -> None:
        """Raises UsageError for options that have no effect without a chat template."""
        for name, value in template_options.items():
            if value is not None:
                raise UsageError(
                    f"{name} needs a chat template, which raw text and token ids do not pass",
                    param=name,
                )
        if system is not None and isinstance(prompt, str):
            raise UsageError(
                "a system prompt needs a chat template; put it into the prompt itself",
                param="system",
            )

    def _in_vocabulary(self, ids: list[int], source: str) -> list[int]:
        size = self.target.info.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            token = next(i for i in ids if not 0 <= i < size)
            error = f"token id {token} is outside the target's vocabulary of {size}"
            if source == "the tokenizer":
                name = self.tokenizer.convert_ids_to_tokens(token)
                error = (
                    f"the tokenizer gives {name!r} the {error}: it is another model's, "
                    "or the model was not resized for it"
                )
            raise UsageError(error, param="prompt")
        return ids

    def _drafter(self, options: Mapping[str, Any]) -> tuple[Drafter[Any], Profile]:
        """The drafter for a request's `drafter_options` and its profile, built once and cached."""
        merged = {**self.drafter_options, **options}
        if merged == self.drafter_options:
            return self.drafter, self.profile
        if self.spec is None:
            raise DrafterError(
                "drafter_options need a drafter given by name; this one was given as an object"
            )
        key = json.dumps(merged, sort_keys=True, default=str)
        with self._lock:
            pair = self._drafters.get(key)
        # built without the lock: building is slow, and the process may fork meanwhile
        if pair is None:
            drafter = self._build(self.spec, merged)
            pair = drafter, profile_of(drafter)
        with self._lock:
            pair = self._drafters.setdefault(key, pair)
            self._drafters.move_to_end(key)
            if len(self._drafters) > MAX_CACHED_DRAFTERS:
                self._drafters.popitem(last=False)
        return pair

    def _build(self, drafter: str | Drafter[Any], options: Mapping[str, Any]) -> Drafter[Any]:
        if isinstance(drafter, str):
            info = replace(self.target.info, device=self.drafter_device)
            drafter = catalog.drafter(drafter, info, options)
        return across(drafter, self.drafter_device, self.target.info.device)

    @property
    def _template(self) -> ChatTemplate | None:
        tokenizer = self._tokenizer()
        return self._chat_template if getattr(tokenizer, "chat_template", None) else None

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def _hidden_tokens(self) -> tuple[Mapping[int, str], frozenset[int]]:
        """The special tokens, which text omits, and the ids of the byte-fallback tokens."""
        return hidden_tokens(self.tokenizer) if self.tokenizer is not None else ({}, frozenset())

    def _grammar(self, options: Options) -> Grammar | None:
        structure = options.structure
        if structure is None:
            return None
        self._tokenizer()
        return self._compiler.compile(*structure)

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.target.info.vocab_size, self.end_ids)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UsageError(
                "this model has no tokenizer; give prompts as lists of token ids", param="prompt"
            )
        return self.tokenizer

    def _text(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)
