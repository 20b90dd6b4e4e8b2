"""The suite for a verifier, on lawful toy drafts: form of its results, and law of the texts.

Shapes: B rows, K drafted tokens, N = K + 1, V vocabulary.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from specdiff.check.doubles import TableDrafter
from specdiff.check.drafters import of_the_target
from specdiff.check.findings import Finding
from specdiff.check.recording import requests, written
from specdiff.drafters.base import NoDrafter
from specdiff.noise import Noise
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, SamplingParams, Verification
from specdiff.verify import Verifier, match

V = 3
ROWS = 256


def check_verifier(verifier: Verifier, *, quick: bool = False) -> Iterator[Finding]:
    """Every finding about a verifier, one by one; a malformed result ends the suite early."""
    form = well_formed(verifier)
    yield form
    if not form.passed:
        return
    yield rows_apart(verifier)
    target = TableTarget.random(V, seed=4)
    count = 5000 if quick else 30_000
    yield of_the_target("law with probabilities", target, TableDrafter(V), verifier, count)
    points = TableDrafter(V, point=True)
    yield of_the_target("law with point masses", target, points, verifier, count)
    yield greedy(verifier)


def _cases(draft_len: int, point: bool) -> tuple[Draft, Float[Tensor, "B N V"], Noise]:
    """Random drafts of ragged size with target rows, some of which rule tokens out."""
    generator = torch.Generator().manual_seed(draft_len)
    batch = Batch.of([[i % V] for i in range(ROWS)], [SamplingParams()] * ROWS, range(ROWS))
    noise = Noise.of(batch)
    context = Context(batch, None, torch.zeros_like(batch.length), None)
    draft = TableDrafter(V, point=point).propose(context, None, noise, draft_len)
    logits = torch.randn(ROWS, draft_len + 1, V, dtype=torch.float64, generator=generator)
    p = torch.softmax(2 * logits, dim=-1)
    p = p * ((torch.rand(p.shape, generator=generator) < 0.7) | (p == p.amax(-1, keepdim=True)))
    return draft, p / p.sum(-1, keepdim=True), noise


def _wrong(draft: Draft, p: Float[Tensor, "B N V"], v: Verification) -> str | None:
    """What is malformed in a verification, if anything."""
    rows, K = draft.tokens.shape
    if v.tokens.shape != (rows, K + 1) or v.accepted.shape != (rows,):
        return (
            f"tokens {list(v.tokens.shape)} and accepted {list(v.accepted.shape)} should be "
            f"[{rows}, {K + 1}] and [{rows}]"
        )
    size = draft.sizes
    if bool(((v.accepted < 0) | (v.accepted > size)).any()):
        return "it accepts fewer than 0 tokens, or more than the draft's size"
    index = torch.arange(K + 1)
    drafted = index < v.accepted[:, None]
    padding = index > v.accepted[:, None]
    if bool(((v.tokens != torch.nn.functional.pad(draft.tokens, (0, 1))) & drafted).any()):
        return "the accepted tokens are not the draft's"
    if bool((v.tokens[padding] != 0).any()):
        return "the entries after the emitted tokens are not 0"
    if bool(((p.gather(-1, v.tokens[..., None])[..., 0] == 0) & ~padding).any()):
        return "it emits tokens of target probability 0"
    return None


def well_formed(verifier: Verifier) -> Finding:
    """Shapes, counts and tokens for drafts of 0 to 24 tokens, with and without probabilities."""
    for K, point in [(0, False), (1, False), (1, True), (3, False), (3, True), (24, False)]:
        draft, p, noise = _cases(max(K, 1), point)
        if K == 0:
            draft = Draft(draft.tokens[:, :0])
            p = p[:, :1]
        try:
            wrong = _wrong(draft, p, verifier(draft, p, noise))
        except Exception as error:
            wrong = f"it raised {type(error).__name__}: {error}"
        if wrong:
            kind = "point masses" if point else "tokens"
            return Finding("well formed", False, f"drafts of {K} {kind}: {wrong}")
    message = "drafts of 0, 1, 3 and 24 tokens, soft and point masses, ragged"
    return Finding("well formed", True, message)


def rows_apart(verifier: Verifier) -> Finding:
    """A row's outcome is a function of that row."""
    draft, p, noise = _cases(3, point=False)
    whole = verifier(draft, p, noise)
    again = verifier(draft, p, noise)
    assert draft.probs is not None and draft.size is not None
    some = torch.arange(ROWS).flip(0)[::3]
    part = verifier(
        Draft(draft.tokens[some], draft.probs[some], draft.size[some]),
        p[some],
        Noise(noise.seed[some], noise.round[some], noise.position[some]),
    )
    if not torch.equal(whole.tokens, again.tokens):
        message = "the same draft and noise gave another outcome: draw from `noise` only"
        return Finding("rows apart", False, message)
    if not torch.equal(whole.tokens[some], part.tokens):
        message = "a row's outcome depends on the other rows of its batch"
        return Finding("rows apart", False, message)
    return Finding("rows apart", True, f"{ROWS} rows, and a third of them in reverse")


def greedy(verifier: Verifier) -> Finding:
    """At temperature 0 the texts are plain decoding's."""
    target = TableTarget.random(V, seed=4)
    queue = requests(target, 8, [SamplingParams(max_tokens=20, temperature=0)])
    plain = written(target, NoDrafter(), queue, match)
    same = written(target, TableDrafter(V), queue, verifier) == plain
    message = "at temperature 0 the tokens are " + ("" if same else "not ") + "plain decoding's"
    return Finding("greedy", same, message)
