"""Equality of greedy answers: where one differs from the reference's, and how close a tie was."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from specdiff.bench.baselines import Decoder, TransformersDecoder
from specdiff.bench.settings import HF, PEERS, VANILLA, Cell
from specdiff.bench.timing import Measurement, Workload
from specdiff.text.comparison import first_difference

# Scoring many tokens in one pass rounds differently from scoring one: float32 differs in the
# sixth digit, bfloat16 in the third. Near-ties may swap; any other difference is an error.
TIES = {torch.float32: 1e-3, torch.float64: 1e-9}  # for logits around 10 to 30
COARSE_TIE = 0.5  # the same for 8 or 11 bits of mantissa
ENDED = -1


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference of a greedy answer from the reference's.

    tokens: the cell's and the reference's, -1 for an answer that ended.
    top2_gap, top2: the target's two largest logits there; None if they could not be computed.
    near_tie: the difference is a rounding error.
    """

    stage: str
    baseline: str
    draft_len: int | str | None
    steps: int | None
    verifier: str | None
    temperature: float
    batch: int
    prompt: str
    position: int
    tokens: list[int]
    top2_gap: float | None
    near_tie: bool
    top2: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Tie:
    """How close the largest logits of a position are, by transformers' own forward pass."""

    top2_gap: float | None
    top2: list[int] | None
    near_tie: bool


def divergences(
    judge: Decoder | None,
    dtype: torch.dtype,
    work: Workload,
    names: Sequence[str],
    answers: Mapping[Cell, Measurement | str],
) -> Iterator[Divergence]:
    """Each answer's first difference from the reference's (transformers', else plain decoding's),
    row by row. `judge` scores the position, `names` are the prompts'. Other engines are omitted:
    they compute with other numbers."""
    runs = {
        cell: run
        for cell, run in answers.items()
        if isinstance(run, Measurement) and cell.baseline not in PEERS
    }
    references = {cell.baseline: run for cell, run in runs.items()}
    reference = references.get(HF) or references.get(VANILLA)
    if reference is None:
        return
    for cell, run in runs.items():
        for row, (own, other) in enumerate(zip(run.tokens, reference.tokens, strict=True)):
            at = first_difference(own, other)
            if at is None:
                continue
            pair = [tokens[at] if at < len(tokens) else ENDED for tokens in (own, other)]
            tie = tie_at(judge, [*work.prompts[row], *other[:at]], pair, dtype)
            yield Divergence(
                **asdict(cell),
                prompt=names[row],
                position=at,
                tokens=pair,
                top2_gap=tie.top2_gap,
                near_tie=tie.near_tie,
                top2=tie.top2,
            )


@torch.inference_mode()
def tie_at(
    judge: Decoder | None, ids: Sequence[int], pair: Sequence[int], dtype: torch.dtype
) -> Tie:
    """The target's largest logits after `ids`.

    In a near-tie neither token of `pair` lies far below the largest.
    """
    if not isinstance(judge, TransformersDecoder):
        return Tie(None, None, near_tie=False)
    model = judge.model
    try:
        logits = model(torch.tensor([list(ids)], device=model.device)).logits[0, -1].float()
    except RuntimeError:  # out of memory: the difference is reported without it
        return Tie(None, None, near_tie=False)
    top = logits.topk(2)
    below = float("inf") if ENDED in pair else float(top.values[0] - logits[list(pair)].min())
    return Tie(
        top2_gap=float(top.values[0] - top.values[1]),
        top2=top.indices.tolist(),
        near_tie=below <= TIES.get(dtype, COARSE_TIE),
    )
