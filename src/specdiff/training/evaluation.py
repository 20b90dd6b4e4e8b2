"""Evaluation of a trained drafter: held-out prompts through the real decode loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdiff import catalog, engine
from specdiff.data.corpus import Corpus
from specdiff.data.shards import Row
from specdiff.drafters.base import Drafter
from specdiff.errors import TargetError
from specdiff.noise import row_seed
from specdiff.stats import Stats
from specdiff.targets.base import Target
from specdiff.types import SamplingParams
from specdiff.verify import verifier


def held_out_prompts(corpus: Corpus, rows: Sequence[int], count: int) -> list[list[int]]:
    """Prompts of `count` held-out rows, evenly spread; of a text without one, its first half."""
    count = min(count, len(rows))
    return [_prompt(corpus[rows[i * len(rows) // count]]) for i in range(count)]


def _prompt(row: Row) -> list[int]:
    length = row.prompt_length
    if not 0 < length < len(row.tokens):
        length = max(1, len(row.tokens) // 2)
    prompt: list[int] = row.tokens[:length].tolist()
    return prompt


def acceptance(
    target: Target[Any],
    drafter: Drafter[Any],
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_tokens: int,
    draft_len: int | None = None,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """tau, alpha and the acceptance of each draft position, over all prompts at once."""
    requests: list[engine.Request] = []
    for i, prompt in enumerate(prompts):
        ids = list(prompt)[-(target.info.max_positions - 2) :]
        params = SamplingParams(
            max_tokens=min(max_tokens, target.info.max_positions - len(ids)),
            temperature=temperature,
            stop_token_ids=tuple(stop_ids),
        )
        requests.append(engine.Request(ids, params, row_seed(seed, i)))
    stats = Stats()
    for output in engine.run(
        target,
        drafter,
        requests,
        verifier=verifier("token"),
        draft_len=draft_len or drafter.draft_len,
        rows=len(requests),
    ):
        if output.error is not None:
            raise TargetError(output.error)
        stats.add(output.drafted, output.accepted, len(output.tokens), output.seconds)
    return {
        "tau": round(stats.tau, 4),
        "alpha": round(stats.alpha, 4),
        "per_position": [round(v, 4) for v in stats.per_position],
    }


def of_folder(
    folder: str | Path,
    target: Target[Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """Acceptance at temperature 0 and 1 of the drafter in `folder`, loaded as its users load it."""
    drafter = catalog.drafter(str(folder), target.info)
    metrics: dict[str, Any] = {}
    for temperature in (0.0, 1.0):
        result = acceptance(
            target,
            drafter,
            prompts,
            temperature=temperature,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
        )
        metrics |= {f"{name}_at_{temperature:g}": value for name, value in result.items()}
    return metrics
