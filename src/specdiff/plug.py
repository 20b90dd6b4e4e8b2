"""The loop inside transformers: `model.generate(**inputs, custom_generate=specdiff.custom_generate, ...)`.

transformers prepares everything (processors, stopping criteria, lengths, expanded rows), and calls this in place of its own loop.

Shapes: B rows, P prompt width with its padding, L columns of the longest answer.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMode

from specdiff import catalog, decode
from specdiff.controller import draft_length
from specdiff.drafters.asked import AskedDrafter
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import UnsupportedModelError, UsageError
from specdiff.noise import row_seed
from specdiff.stats import Stats
from specdiff.targets.causal import CausalTarget, attached
from specdiff.targets.prepared import PreparedTarget
from specdiff.types import Batch, Params, Round, SamplingParams
from specdiff.verify import verifier as verifier_named
from specdiff.written import Ending, Written

PLAIN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# what transformers prepares for its own loop; all else would change what the model sees
PREPARED = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})
DRAFTERS: WeakKeyDictionary[CausalTarget, dict[str, Drafter[Any]]] = WeakKeyDictionary()  # built once a target and spec


def custom_generate(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B P"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    drafter: str | Drafter[Any] = "auto",
    drafter_options: Mapping[str, Any] | None = None,
    verifier: str = "token",
    draft_len: int | str | None = None,
    text_streamer: BaseStreamer | None = None,
    stats: Stats | None = None,
    **model_kwargs: Any,
) -> Int[Tensor, "B P+L"] | GenerateDecoderOnlyOutput:
    """Speculative decoding for `model.generate(**inputs, custom_generate=specdiff.custom_generate, ...)`: rows of the same law as
    without it, in the same shape; in float32 the same tokens where do_sample is off. Not to be called by hand.

    Processors, criteria, end-of-text and length limits, left-padded batches, num_return_sequences, return_dict_in_generate with
    output_scores and output_logits are transformers' own. Processors and criteria must be functions of the token ids (and the scores):
    a draft's positions are asked about ahead of time, and criteria get None for scores. Where do_sample is on, all randomness comes
    from torch's default generator: `transformers.set_seed` fixes it.

    The model is tested once, at its first use: whether scoring drafts gives its own logits. It keeps computing the same by itself.

    Args:
        drafter: a spec as in `specdiff.load` ("auto": the bundled one for this model, "ngram": from the text itself), or a Drafter.
        drafter_options: keyword arguments of a drafter given by spec.
        verifier: "token", "block", "match" or "match-gumbel".
        draft_len: K, "auto" (drafting rests while it does not pay), or None: "auto" where the text cannot depend on it (greedy and
            match), else the drafter's own.
        text_streamer: a transformers streamer; gets the prompts, each column of tokens, and the end. (generate keeps `streamer` to
            itself.) Likewise `tokenizer` and with it stop_strings: pass stopping_criteria=[StopStringCriteria(tokenizer, strings)].
        stats: a `specdiff.Stats` to add this run's rounds to, those of all rows.
        model_kwargs: what transformers prepared.

    Raises UsageError for what cannot be kept (beams, assistants, outputs of inner layers, a cache or embeddings as input, processors
    with memory, padding elsewhere than on the left), and UnsupportedModelError for a model that fails the self-test.
    """
    _refuse(model, generation_config, model_kwargs)
    target = attached(model)
    if input_ids.device != target.info.device:
        raise UsageError(f"input_ids are on {input_ids.device}, the model on {target.info.device}; move them there")
    pad = generation_config._pad_token_tensor
    ending = Ending(stopping_criteria, input_ids, 0 if pad is None else int(pad))
    prompts = _prompts(input_ids, model_kwargs)
    reach = max(map(len, prompts)) + ending.new
    if reach > target.info.max_positions:
        raise UsageError(f"prompt and answer may reach {reach} tokens, but the model has {target.info.max_positions} positions; "
                         f"lower max_new_tokens")  # fmt: skip
    prepared = PreparedTarget(target, logits_processor, input_ids, ending.pad)
    made = _drafter(target, drafter, drafter_options)
    sampled = bool(generation_config.do_sample)
    length = draft_length(draft_len, made, steady=sampled and not verifier.startswith("match"))
    batch = _batch(prompts, ending, sampled, input_ids.device)
    asked = AskedDrafter(made, _asked(generation_config, batch))
    slots = reach + max(made.draft_len, length if isinstance(length, int) else 0) + 1
    run = decode.start(prepared, asked, batch, verifier=verifier_named(verifier), slots=slots)
    decode.admit(run, torch.arange(len(prompts), device=input_ids.device))
    told = bool(generation_config.return_dict_in_generate)
    kept = {"scores": told and bool(generation_config.output_scores), "logits": told and bool(generation_config.output_logits)}
    written = Written(ending, text_streamer, stats, **kept)
    last: Round | None = None
    while not bool(run.batch.done.all()):
        last = decode.step(run, length if isinstance(length, int) else length(last), ending if ending.rest else None)
        written.add(last, run.cache)
    return written.output(run.batch) if told else written.finish(run.batch)


def _refuse(model: PreTrainedModel, config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    """Raises where the answer could not be what `generate` gives without us."""
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"a {model.config.model_type} model encodes its prompt apart from its answer, which cannot be drafted for"
        )
    mode = config.get_generation_mode()
    if mode not in PLAIN:
        raise UsageError(f"custom_generate=specdiff.custom_generate does greedy search and sampling, not {mode.value}; leave out what "
                         f"asks for it (num_beams, penalty_alpha, prompt_lookup_num_tokens, ...), or custom_generate")  # fmt: skip
    if model.training:
        raise UsageError("the model is in training mode, where dropout makes its law another at every pass; call model.eval() first")
    inner = [name for name in ("output_attentions", "output_hidden_states") if getattr(config, name)]
    if inner:
        raise UsageError(f"{inner[0]} cannot be given: positions are scored several at a time; leave it out, or custom_generate")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and "_is_user_defined" in vars(cache):  # transformers' own mark; its fresh one has none
        raise UsageError("past_key_values cannot be continued; leave it out, and give the whole text as input_ids")
    unknown = sorted(name for name, value in model_kwargs.items() if value is not None and name not in PREPARED)
    if unknown:
        raise UsageError(f"{unknown[0]} as model input is not supported: drafts are token ids alone; leave it out, or custom_generate")


def _prompts(input_ids: Int[Tensor, "B P"], model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """The rows without their padding. Raises UsageError where it is not on the left, or positions are not counted from its end."""
    given = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if given is None else given.long()
    if not input_ids.shape[1] or bool((mask[:, -1] != 1).any()) or bool((mask.diff(dim=1) < 0).any()):
        raise UsageError("attention_mask must be zeros, then ones up to the end of each row; tokenize with padding_side='left', and give "
                         "the mask (without one, transformers takes every pad token for padding, inside a text too)")  # fmt: skip
    positions = model_kwargs.get("position_ids")
    usual = (mask.cumsum(1) - 1) * mask
    if positions is not None and (positions.shape[-1] != mask.shape[1] or bool((positions * mask != usual).any())):
        raise UsageError("position_ids must count the attended tokens from 0; leave them out")
    return [row[-int(n) :].tolist() for row, n in zip(input_ids, mask.sum(1), strict=True)]


def _drafter(target: CausalTarget, drafter: str | Drafter[Any], options: Mapping[str, Any] | None) -> Drafter[Any]:
    if isinstance(drafter, Drafter):
        if options:
            raise UsageError("drafter_options need a drafter given by name; this one was given as an object")
        return drafter
    key = json.dumps([drafter, dict(options or {})], sort_keys=True, default=str)
    known = DRAFTERS.setdefault(target, {})
    if key not in known:
        known[key] = catalog.drafter(drafter, target.info, options)
        if drafter == "auto" and isinstance(known[key], NoDrafter):
            told = f"no drafter was trained for {target.info.name!r}: decoding plainly; drafter='ngram' needs no training"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
    return known[key]


def _batch(prompts: list[list[int]], ending: Ending, sampled: bool, device: torch.device) -> Batch:
    """Rows whose own parameters are neutral: the processors have said it all."""
    params = SamplingParams(max_tokens=ending.new, temperature=1.0 if sampled else 0.0, stop_token_ids=ending.ids)
    root = int(torch.randint(1 << 62, ())) if sampled else 0
    return Batch.of(prompts, [params] * len(prompts), [row_seed(root, i) for i in range(len(prompts))], device=device)


def _asked(config: GenerationConfig, batch: Batch) -> Params:
    """What a drafter can make use of: the sampling parameters, as far as they are ours too."""
    sampling: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        sampling = {name: value for name in ("temperature", "top_k", "top_p", "min_p") if (value := getattr(config, name)) is not None}
    own = SamplingParams(repetition_penalty=config.repetition_penalty or 1.0, **sampling)
    return Params.stack([own] * len(batch.length), batch.params.limit, batch.length.device)
