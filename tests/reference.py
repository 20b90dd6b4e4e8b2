"""The sampling options once more, one token at a time in plain Python, as their definitions read."""

import math
from collections import Counter
from collections.abc import Sequence

from specdiff.types import SamplingParams


def adjusted(logits: Sequence[float], prompt: Sequence[int], answer: Sequence[int], params: SamplingParams) -> list[float]:
    """One row's logits under allowed ids, bias and penalties, where `answer` is all that stands behind the prompt."""
    bias, counts = dict(params.logit_bias), Counter(answer)
    result = []
    for token, logit in enumerate(logits):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            result.append(-math.inf)
            continue
        logit += bias.get(token, 0.0)
        if token in prompt or token in answer:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * counts[token]
        logit -= params.presence_penalty if counts[token] else 0.0
        result.append(logit)
    return result
