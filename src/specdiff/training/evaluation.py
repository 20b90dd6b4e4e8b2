"""What a drafter is worth, measured where it counts: held-out prompts through the real decode loop.

Shapes: G drafted positions, C columns.
"""

from collections.abc import Sequence
from typing import Any

from specdiff import catalog, engine
from specdiff.data.corpus import Corpus
from specdiff.drafters.base import Drafter
from specdiff.errors import TargetError
from specdiff.noise import row_seed
from specdiff.stats import Stats
from specdiff.targets.base import Target
from specdiff.types import SamplingParams
from specdiff.verify import verifier


def held_out_prompts(corpus: Corpus, rows: Sequence[int], count: int) -> list[list[int]]:
    """Prompts of held-out rows, spread over them; a text without a prompt lends its first half."""
    chosen = [rows[i * len(rows) // min(count, len(rows))] for i in range(min(count, len(rows)))]
    found = [corpus[i] for i in chosen]
    return [
        r.tokens[
            : max(1, r.prompt_length if 0 < r.prompt_length < len(r.tokens) else len(r.tokens) // 2)
        ].tolist()
        for r in found
    ]


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
    room = target.info.max_positions
    requests = [
        engine.Request(
            list(p)[-(room - 2) :],
            SamplingParams(
                max_tokens=min(max_tokens, room - min(len(p), room - 2)),
                temperature=temperature,
                stop_token_ids=tuple(stop_ids),
            ),
            row_seed(seed, i),
        )
        for i, p in enumerate(prompts)
    ]
    total = Stats()
    length = draft_len or drafter.draft_len
    for p in engine.run(
        target, drafter, requests, verifier=verifier("token"), draft_len=length, rows=len(requests)
    ):
        if p.error is not None:
            raise TargetError(p.error)
        total.add(p.drafted, p.accepted, len(p.tokens), p.seconds)
    return {
        "tau": round(total.tau, 4),
        "alpha": round(total.alpha, 4),
        "per_position": [round(v, 4) for v in total.per_position],
    }


def of_folder(
    folder: str,
    target: Target[Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """Acceptance at temperature 0 and 1 of the drafter in `folder`: the very files its users will run."""
    drafter = catalog.drafter(folder, target.info)
    measured: dict[str, Any] = {}
    for temperature in (0.0, 1.0):
        found = acceptance(
            target,
            drafter,
            prompts,
            temperature=temperature,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
        )
        measured |= {f"{name}_at_{temperature:g}": value for name, value in found.items()}
    return measured
