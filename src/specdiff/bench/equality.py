"""At temperature 0 every baseline must emit the target's own tokens; where one does not, how near a tie that was.

Scoring many tokens in one pass rounds otherwise than scoring one: float32 differs in the sixth digit, bfloat16 in the third, so
logits closer than that may change places. Anything else is an error, and is called one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from specdiff.bench.baselines import Decoder, Theirs
from specdiff.bench.plan import HF, VANILLA, Cell
from specdiff.bench.runs import Ask, Run
from specdiff.bench.session import Session

TIES = {torch.float32: 1e-3, torch.float64: 1e-9}  # of logits around 10 to 30
COARSE = 0.5  # the same for 8 or 11 bits of mantissa
ENDED = -1


def divergences(
    loaded: Session, ask: Ask, names: Sequence[str], answers: Mapping[Cell, Run | str]
) -> list[dict[str, Any]]:
    """The first difference of each answer from the reference's (transformers' own, else plain decoding's), row by row."""
    whole = {cell: run for cell, run in answers.items() if isinstance(run, Run)}
    reference = next(
        (run for name in (HF, VANILLA) for cell, run in whole.items() if cell.baseline == name),
        None,
    )
    if reference is None:
        return []
    found, judge = [], loaded.decoders.get(HF)
    for cell, run in whole.items():
        for row, (own, theirs) in enumerate(zip(run.tokens, reference.tokens, strict=True)):
            at = first_difference(own, theirs)
            if at is not None:
                pair = [t[at] if at < len(t) else ENDED for t in (own, theirs)]
                told = {**cell.as_dict(), "prompt": names[row], "position": at, "tokens": pair}
                found.append(
                    told
                    | _gap(
                        judge, [*ask.prompts[row], *theirs[:at]], pair, loaded.lm.target.info.dtype
                    )
                )
    return found


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where they differ; the shorter one's end, where it begins the longer one."""
    differs = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return min(len(a), len(b)) if differs is None and len(a) != len(b) else differs


@torch.inference_mode()
def _gap(
    judge: Decoder | None, ids: Sequence[int], pair: Sequence[int], dtype: torch.dtype
) -> dict[str, Any]:
    """How far the target's two largest logits lie apart behind `ids`, by transformers' own forward pass.

    A near tie is one of the two tokens that differ: neither may lie far below the largest.
    """
    unknown = {"top2_gap": None, "top2": None, "near_tie": False}
    if not isinstance(judge, Theirs):
        return unknown
    try:
        logits = (
            judge.model(torch.tensor([list(ids)], device=judge.model.device)).logits[0, -1].float()
        )
    except RuntimeError:  # out of memory: the difference is told all the same
        return unknown
    top = logits.topk(2)
    behind = float("inf") if ENDED in pair else float(top.values[0] - logits[list(pair)].min())
    return {
        "top2_gap": float(top.values[0] - top.values[1]),
        "top2": top.indices.tolist(),
        "near_tie": behind <= TIES.get(dtype, COARSE),
    }
