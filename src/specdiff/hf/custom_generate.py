"""The decoding loop for transformers: `model.generate(custom_generate=specdiff.custom_generate)`.

transformers prepares everything (processors, stopping criteria, lengths, expanded rows), and calls
this in place of its own loop.

Shapes: B rows, P prompt width with its padding, L columns of the longest answer.
"""

import inspect
import json
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMode

from specdiff import catalog, decode
from specdiff.controller import draft_length
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import UnsupportedModelError, UsageError
from specdiff.hf.output import OutputWriter, StopRules
from specdiff.hf.params_drafter import ParamsDrafter
from specdiff.hf.processed_target import ProcessedTarget
from specdiff.hf.repeats import own
from specdiff.noise import row_seed
from specdiff.stats import Stats
from specdiff.targets.causal import CausalTarget, attached
from specdiff.types import Batch, Params, Round, SamplingParams
from specdiff.verify import verifier as verifier_named

PLAIN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# model inputs that transformers prepares for its own loop; others would change the logits
PREPARED = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
)
COLDEST = 1e-30  # logits divided by less overflow: only the argmax remains
# ranges of SamplingParams
HINTS: dict[str, tuple[float, float]] = {"repetition_penalty": (1e-6, 1e6)}
TEMPERED: dict[str, tuple[float, float]] = {
    "temperature": (COLDEST, 1e6),
    "top_k": (0, 1 << 31),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
}
MOST_DRAFTERS = 8  # of each target, the most recently used
DRAFTERS: WeakKeyDictionary[CausalTarget, OrderedDict[str, Drafter[Any]]] = WeakKeyDictionary()
LOCK = threading.Lock()  # around DRAFTERS


def custom_generate(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B P"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    drafter: str | os.PathLike[str] | Drafter[Any] = "auto",
    drafter_options: Mapping[str, Any] | None = None,
    verifier: str = "token",
    draft_len: int | str | None = None,
    text_streamer: BaseStreamer | None = None,
    stats: Stats | None = None,
    **model_kwargs: Any,
) -> Int[Tensor, "B P+L"] | GenerateDecoderOnlyOutput:
    """Speculative decoding in `model.generate(**inputs, custom_generate=specdiff.custom_generate)`.

    The output has the same distribution and shape as without it, and in float32 the same tokens if
    do_sample is off. Not meant to be called directly.

    Processors, criteria, end-of-text and length limits, left-padded batches, num_return_sequences,
    and return_dict_in_generate with output_scores and output_logits work as in transformers.
    Processors must be functions of the token ids and the scores, since a draft's positions are
    processed ahead of time. Your own, and prefix_allowed_tokens_fn, are called twice for some
    texts; one that answers differently is refused. (With drafter="none" each position is processed
    once, in order, so a processor with a memory works.) Criteria get None for scores. If do_sample
    is on, all randomness comes from torch's default generator: `transformers.set_seed` fixes it.

    The model is tested at its first use, and again once its config, attention or weights have
    changed: scoring a draft must give the model's own logits. Its own forward is not changed.

    Args:
        drafter: a spec as in `specdiff.load` ("auto": the bundled one for this model, "ngram": from
            the text itself), or a Drafter.
        drafter_options: keyword arguments of a drafter given by spec.
        verifier: "token", "block", "match" or "match-gumbel".
        draft_len: K, "auto" (drafting is off while it does not pay), or None: "auto" where the text
            cannot depend on it (greedy and match), else the drafter's own.
        text_streamer: a transformers streamer; gets the prompts, each column of tokens, and the
            end. So does generate's own `streamer`. (generate does not pass on `tokenizer`, which
            stop_strings need: pass stopping_criteria=[StopStringCriteria(tokenizer, strings)].)
        stats: a `specdiff.Stats` to which the rounds of all rows are added.
        model_kwargs: the model inputs that transformers prepared.

    Raises UsageError for what is not supported (beams, assistants, outputs of inner layers, a cache
    or embeddings as input, processors with a memory, padding that is not on the left), and
    UnsupportedModelError for a model that fails the self-test.
    """
    _refuse(model, generation_config, model_kwargs)
    _check(drafter, drafter_options, verifier, stats)
    target = attached(model)
    if input_ids.device != target.info.device:
        raise UsageError(
            f"input_ids are on {input_ids.device}, the model on {target.info.device}; "
            "move them there"
        )
    pad = generation_config._pad_token_tensor
    rules = StopRules(stopping_criteria, input_ids, 0 if pad is None else int(pad))
    prompts = _prompts(input_ids, model_kwargs)
    reach = max(map(len, prompts)) + rules.max_new
    if reach > target.info.max_positions:
        raise UsageError(
            f"prompt and answer may reach {reach} tokens, but the model has "
            f"{target.info.max_positions} positions; lower max_new_tokens"
        )
    base = _drafter(target, drafter, drafter_options)
    processors, sampling = _sampling(logits_processor, bool(generation_config.do_sample))
    scorer = ProcessedTarget(target, processors, input_ids, rules.pad, drafted=base.draft_len > 0)
    length = draft_length(draft_len, base, steady=sampling and not verifier.startswith("match"))
    batch = _batch(prompts, rules, sampling, input_ids.device)
    proposer = ParamsDrafter(base, _hint(generation_config, batch, sampling))
    slots = reach + max(base.draft_len, length if isinstance(length, int) else 0) + 1
    streamer = _streamer(text_streamer, input_ids)
    run = decode.start(scorer, proposer, batch, verifier=verifier_named(verifier), slots=slots)
    rows = torch.arange(len(prompts), device=input_ids.device)
    detailed = bool(generation_config.return_dict_in_generate)
    scores = detailed and bool(generation_config.output_scores)
    logits = detailed and bool(generation_config.output_logits)
    writer = OutputWriter(rules, streamer, stats, scores=scores, logits=logits)
    stop = rules if rules.criteria else None
    last: Round | None = None
    try:
        decode.admit(run, rows)
        while not bool(run.batch.done.all()):
            K = length if isinstance(length, int) else length(last)
            last = decode.step(run, K, stop)
            scorer.check(run.cache, last)  # first: a processor's fault is not the target's
            decode.raise_if_failed(last)
            writer.add(last, run.cache)
    finally:
        decode.release(run, rows)
    scorer.finish(run.cache)
    return writer.output(run.batch) if detailed else writer.finish(run.batch)


def _check(drafter: Any, options: Any, verifier: Any, stats: Any) -> None:
    """Raises UsageError for an argument of a wrong type."""
    if not isinstance(drafter, (str, os.PathLike, Drafter)):
        kinds = "a name, a folder or a specdiff.Drafter"
        raise UsageError(f"drafter must be {kinds}, not {drafter!r}; 'none' decodes plainly")
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(f"drafter_options must be a mapping of keyword arguments, not {options!r}")
    if not isinstance(verifier, str):
        raise UsageError(f"verifier must be a name, not {verifier!r}")
    if stats is not None and not isinstance(stats, Stats):
        raise UsageError(f"stats must be a specdiff.Stats, not {stats!r}")


def _streamer(
    text_streamer: BaseStreamer | None,
    prompts: Int[Tensor, "B P"],
) -> BaseStreamer | None:
    """`text_streamer` with the prompts put into it, or the streamer passed to `generate`.

    generate puts the prompts into its own streamer, but passes it to no custom loop: a reader would
    wait forever. Raises UsageError if both are present.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    streamer = None if frame is None else frame.f_locals.get("streamer")
    if text_streamer is None:
        return streamer
    if streamer is not None:
        raise UsageError("streamer and text_streamer both ask for the tokens; give one of them")
    put: Any = text_streamer.put  # untyped in transformers
    put(prompts.cpu())
    return text_streamer


def _refuse(
    model: PreTrainedModel, config: GenerationConfig, model_kwargs: Mapping[str, Any]
) -> None:
    """Raises an error if the answer could differ from that of plain `generate`."""
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"a {model.config.model_type} model encodes its prompt separately from its answer, "
            "which cannot be drafted for"
        )
    mode = config.get_generation_mode()
    if mode not in PLAIN:
        raise UsageError(
            "custom_generate=specdiff.custom_generate does greedy search and sampling, not "
            f"{mode.value}; leave out the option that asks for it (num_beams, penalty_alpha, "
            "prompt_lookup_num_tokens, ...), or custom_generate"
        )
    if model.training:
        raise UsageError(
            "the model is in training mode, where dropout changes its distribution at every pass; "
            "call model.eval() first"
        )
    inner = [
        name for name in ("output_attentions", "output_hidden_states") if getattr(config, name)
    ]
    if inner:
        raise UsageError(
            f"{inner[0]} cannot be given: positions are scored several at a time; leave it out, "
            "or custom_generate"
        )
    cache = model_kwargs.get("past_key_values")
    # transformers' mark of a cache that the user passed
    if cache is not None and "_is_user_defined" in vars(cache):
        raise UsageError(
            "past_key_values cannot be continued; leave it out, "
            "and give the whole text as input_ids"
        )
    unknown = sorted(
        name for name, value in model_kwargs.items() if name not in PREPARED and not _empty(value)
    )
    if unknown:
        raise UsageError(
            f"{unknown[0]} as model input is not supported: drafts are token ids alone; "
            "leave it out, or custom_generate"
        )


def _empty(value: Any) -> bool:
    """None, or a collection of nothing else, as transformers prepares for absent images, say."""
    if isinstance(value, Mapping):
        return all(_empty(part) for part in value.values())
    return value is None or (isinstance(value, Sequence) and all(_empty(part) for part in value))


def _prompts(input_ids: Int[Tensor, "B P"], model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """The rows without their padding.

    Raises UsageError if padding is not on the left, or positions are not counted from its end.
    """
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.long()
    holes = bool((mask[:, -1:] != 1).any()) or bool((mask.diff(dim=1) < 0).any())
    if not input_ids.shape[1] or holes:
        raise UsageError(
            "attention_mask must be zeros, then ones up to the end of each row; tokenize with "
            "padding_side='left', and give the mask (without one, transformers takes every pad "
            "token for padding, inside a text too)"
        )
    positions = model_kwargs.get("position_ids")
    default = (mask.cumsum(1) - 1) * mask
    if positions is not None and (
        positions.shape[-1] != mask.shape[1] or bool((positions * mask != default).any())
    ):
        raise UsageError("position_ids must count the attended tokens from 0; leave them out")
    return [row[-int(n) :].tolist() for row, n in zip(input_ids, mask.sum(1), strict=True)]


def _drafter(
    target: CausalTarget,
    drafter: str | os.PathLike[str] | Drafter[Any],
    options: Mapping[str, Any] | None,
) -> Drafter[Any]:
    """The drafter of a spec, cached while it is among the target's most recently used."""
    if isinstance(drafter, Drafter):
        if options:
            raise UsageError(
                "drafter_options need a drafter given by name; this one was given as an object"
            )
        return drafter
    spec = os.fspath(drafter)
    try:
        key = json.dumps([spec, dict(options or {})], sort_keys=True)
    except TypeError:  # options that are objects: no text identifies them for certain
        return catalog.drafter(spec, target.info, options)
    with LOCK:
        cache = DRAFTERS.setdefault(target, OrderedDict())
        if key in cache:
            cache.move_to_end(key)
            return cache[key]
    built = catalog.drafter(spec, target.info, options)
    if spec == "auto" and isinstance(built, NoDrafter):
        plainly = "decoding plainly; drafter='ngram' needs no training"
        message = f"no drafter was trained for {target.info.name!r}: {plainly}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    with LOCK:
        built = cache.setdefault(key, built)
        cache.move_to_end(key)
        while len(cache) > MOST_DRAFTERS:
            cache.popitem(last=False)
    return built


def _sampling(processors: LogitsProcessorList, sampling: bool) -> tuple[LogitsProcessorList, bool]:
    """The processors, and whether to sample.

    A temperature close to 0 leaves only the argmax, whatever warpers come after it.
    """
    cold = [type(p) is TemperatureLogitsWarper and p.temperature < COLDEST for p in processors]
    if not sampling or True not in cold:
        return processors, sampling
    place = cold.index(True)
    if any(own(p) for p in processors[place:]):
        return processors, sampling
    return LogitsProcessorList(processors[:place]), False


def _batch(
    prompts: list[list[int]], rules: StopRules, sampling: bool, device: torch.device
) -> Batch:
    """Rows with neutral sampling parameters: the processors define the distribution."""
    params = SamplingParams(
        max_tokens=rules.max_new,
        temperature=1.0 if sampling else 0.0,
        stop_token_ids=rules.end_ids,
    )
    root = int(torch.randint(1 << 62, ())) if sampling else 0
    return Batch.of(
        prompts,
        [params] * len(prompts),
        [row_seed(root, i) for i in range(len(prompts))],
        device=device,
    )


def _hint(config: GenerationConfig, batch: Batch, sampling: bool) -> Params:
    """Sampling parameters for the drafter, as far as SamplingParams has them.

    The processors define the distribution, so a value outside the range of SamplingParams is
    replaced by the closest one in it.
    """
    ranges = HINTS | TEMPERED if sampling else HINTS
    values: dict[str, Any] = {}
    for name, (lowest, highest) in ranges.items():
        value = getattr(config, name)
        if value is not None:
            values[name] = min(max(value, lowest), highest)
    if not sampling:
        values["temperature"] = 0.0
    params = SamplingParams(**values)
    return Params.stack([params] * len(batch.length), batch.params.limit, batch.length.device)
