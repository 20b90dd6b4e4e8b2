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
from collections.abc import Mapping
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
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from specdiff import catalog, decode
from specdiff.controller import draft_length, free_of_drafts, profile_of
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import UsageError
from specdiff.hf.inputs import check_types, refuse, unpadded
from specdiff.hf.output import OutputWriter, StopRules
from specdiff.hf.params_drafter import ParamsDrafter
from specdiff.hf.processed_target import ProcessedTarget
from specdiff.hf.repeats import own
from specdiff.noise import row_seed
from specdiff.profile import Profile
from specdiff.stats import Stats
from specdiff.targets.causal import CausalTarget, attached
from specdiff.types import Batch, Params, Round, SamplingParams
from specdiff.verify import verifier as verifier_named

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
CACHED_DRAFTERS: WeakKeyDictionary[CausalTarget, OrderedDict[str, Drafter[Any]]] = (
    WeakKeyDictionary()
)
PROFILES: WeakKeyDictionary[CausalTarget, WeakKeyDictionary[Drafter[Any], Profile]] = (
    WeakKeyDictionary()
)
LOCK = threading.Lock()  # around both


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
        draft_len: K, "auto" (drafting is off while it does not pay; later calls start from what
            earlier ones measured), or None: "auto" where the text cannot depend on it (greedy and
            match), else the drafter's own.
        text_streamer: a transformers streamer; gets the prompts, each column of tokens, and the
            end. So does generate's own `streamer`. (generate does not pass on `tokenizer`, which
            stop_strings need: pass stopping_criteria=[StopStringCriteria(tokenizer, strings)].)
        stats: a `specdiff.Stats` to which the rounds of all rows are added.
        model_kwargs: the model inputs that transformers prepared.

    Raises UsageError for what is not supported (beams, assistants, outputs of inner layers, a cache
    or embeddings as input, processors with a memory, padding that is not on the left, a
    sampled text with a drafter that has a memory, unless by match), and
    UnsupportedModelError for a model that fails the self-test.
    """
    refuse(model, generation_config, model_kwargs)
    check_types(drafter, drafter_options, verifier, stats)
    target = attached(model)
    if input_ids.device != target.info.device:
        raise UsageError(
            f"input_ids are on {input_ids.device}, the model on {target.info.device}; "
            "move them there"
        )
    pad = generation_config._pad_token_tensor
    rules = StopRules(stopping_criteria, input_ids, 0 if pad is None else int(pad))
    prompts = unpadded(input_ids, model_kwargs)
    reach = max(map(len, prompts)) + rules.max_new
    if reach > target.info.max_positions:
        raise UsageError(
            f"prompt and answer may reach {reach} tokens, but the model has "
            f"{target.info.max_positions} positions; lower max_new_tokens"
        )
    base = _drafter(target, drafter, drafter_options)
    processors, sampling = _sampling(logits_processor, bool(generation_config.do_sample))
    scorer = ProcessedTarget(target, processors, input_ids, rules.pad, drafted=base.draft_len > 0)
    steady = not free_of_drafts(verifier, greedy=not sampling)
    if steady and not base.reproducible:
        raise UsageError(
            "sampling takes its seed from torch, which gives no reproducible text under verifier "
            f"{verifier!r} with a drafter that remembers earlier requests; use verifier 'match', "
            "do_sample=False, or memory 0",
            param="drafter_options",
        )
    profile = _profile(target, base)
    length = draft_length(draft_len, base, steady=steady, greedy=not sampling, profile=profile)
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
        cache = CACHED_DRAFTERS.setdefault(target, OrderedDict())
        if key in cache:
            cache.move_to_end(key)
            return cache[key]
    built = catalog.drafter(spec, target.info, options)
    if spec == "auto" and isinstance(built, NoDrafter):
        warnings.warn(
            f"no drafter was trained for {target.info.name!r}: decoding without drafts; "
            "drafter='ngram' needs no training",
            RuntimeWarning,
            stacklevel=2,
        )
    with LOCK:
        built = cache.setdefault(key, built)
        cache.move_to_end(key)
        while len(cache) > MOST_DRAFTERS:
            cache.popitem(last=False)
    return built


def _profile(target: CausalTarget, drafter: Drafter[Any]) -> Profile:
    """What earlier calls with this target and drafter taught; none where it has no hash."""
    profile = profile_of(drafter)
    try:
        with LOCK:
            return PROFILES.setdefault(target, WeakKeyDictionary()).setdefault(drafter, profile)
    except TypeError:
        return profile


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
