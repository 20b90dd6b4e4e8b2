"""The sampling options once more, one token at a time in plain Python, as they are defined."""

import math
from collections import Counter
from collections.abc import Sequence

from specdiff.types import SamplingParams


def adjusted(
    logits: Sequence[float], prompt: Sequence[int], answer: Sequence[int], params: SamplingParams
) -> list[float]:
    """One row's logits under allowed ids, bias and penalties; `answer` follows the prompt."""
    bias = dict(params.logit_bias)
    counts = Counter(answer)
    result = []
    for token, logit in enumerate(logits):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            result.append(-math.inf)
            continue
        logit += bias.get(token, 0.0)
        if token in prompt or token in answer:
            logit = (
                logit / params.repetition_penalty
                if logit > 0
                else logit * params.repetition_penalty
            )
        logit -= params.frequency_penalty * counts[token]
        logit -= params.presence_penalty if counts[token] else 0.0
        result.append(logit)
    return result


def law(
    logits: Sequence[float], prompt: Sequence[int], answer: Sequence[int], params: SamplingParams
) -> list[float]:
    """One row's law under all that `params` asks."""
    scores = adjusted(logits, prompt, answer, params)
    if params.temperature == 0:
        return [float(token == scores.index(max(scores))) for token in range(len(scores))]
    weights = [math.exp((logit - max(scores)) / params.temperature) for logit in scores]
    p = [w / sum(weights) for w in weights]
    if params.top_k:
        p = _at_least(sorted(p, reverse=True)[: params.top_k][-1], p)
    if params.top_p < 1:
        mass = 0.0
        least = iter(sorted(p, reverse=True))
        while mass < params.top_p:
            mass += (last := next(least))
        p = _at_least(last, p)
    return _at_least(params.min_p * max(p), p)


def _at_least(least: float, p: Sequence[float]) -> list[float]:
    support = [x if x >= least else 0.0 for x in p]
    return [x / sum(support) for x in support]
