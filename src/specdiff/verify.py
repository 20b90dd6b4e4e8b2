"""Verifiers: which draft tokens stand, and the law of the token after them.

Each verifier is a plan (a pure function of draft and target probabilities: thresholds, and
residual laws) and a draw (the plan met with uniforms). Tests enumerate every row of the plan; the
loop only ever calls the draw.

Shapes: B rows, K drafted tokens, N = K + 1, V vocabulary (q may have fewer columns). Row k of p and
q conditions on the first k draft tokens; rows k >= size have q_k = 0, so at n = size the residual
is p itself and the bonus token needs no branch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff import verify_tree
from specdiff.errors import UsageError
from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw
from specdiff.tree import counted, depths
from specdiff.types import Draft, Verification

Verifier = Callable[[Draft, Float[Tensor, "B N V"], Noise], Verification]


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision before any draw: token k passes if its uniform is below `thresholds[:, k]`.

    The comparison is strict. `weight[b, n]` scales the target's row in the residual
    (w_n p_n - q_n)+, from which the token after n accepted ones is drawn.
    """

    thresholds: Float[Tensor, "B K"]
    weight: Float[Tensor, "B N"]
    draft: Draft
    p: Float[Tensor, "B N V"]

    def residual(self, rows: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """The normalized law of the next token after `rows[b]` accepted ones."""
        p = self.p.gather(1, rows[:, None, None].expand(-1, 1, self.p.shape[-1]))[:, 0]
        r = (self.weight.gather(1, rows[:, None]) * p - _q_row(self.draft, p, rows)).clamp(min=0)
        total = r.sum(-1, keepdim=True)
        return torch.where(total > 0, r / total.masked_fill(total == 0, 1), p)


def _q_row(
    draft: Draft, like: Float[Tensor, "B V"], rows: Int[Tensor, "B"]
) -> Float[Tensor, "B V"]:
    """q at row `rows[b]`: zero from the draft's size on, a point mass without probabilities."""
    K = draft.tokens.shape[1]
    if K == 0:
        return torch.zeros_like(like)
    at = rows.clamp(max=K - 1)[:, None]
    if draft.probs is None:
        q = torch.zeros_like(like).scatter(1, draft.tokens.gather(1, at), 1)
    else:
        width = draft.probs.shape[-1]
        q = draft.probs.gather(1, at[..., None].expand(-1, 1, width))[:, 0].to(like.dtype)
        if draft.columns is not None:
            q = torch.zeros_like(like).index_copy(1, draft.columns, q)
    return torch.where((rows < draft.sizes)[:, None], q, 0)


def _ratio(draft: Draft, p: Float[Tensor, "B N V"]) -> Float[Tensor, "B K"]:
    """p_k(x_k) / q_k(x_k): 0 where p is 0 (also over q = 0), infinite where only q is."""
    x = draft.tokens[..., None]
    target = p[:, :-1].gather(-1, x)[..., 0]
    q = draft.token_probs()
    if q is None:
        return target
    ratio = target / q.to(p.dtype)
    return torch.where(target > 0, ratio, 0)


def token_plan(draft: Draft, p: Float[Tensor, "B N V"]) -> Plan:
    """Speculative sampling (Leviathan et al. 2023; SpecDiff, Algorithm 1).

    Token k passes with probability min(1, p_k(x_k)/q_k(x_k)).
    """
    thresholds = torch.where(counted(draft), _ratio(draft, p), 0)
    return Plan(thresholds, torch.ones_like(p[..., 0]), draft, p)


def block_plan(draft: Draft, p: Float[Tensor, "B N V"]) -> Plan:
    """Block verification (Sun et al., ICLR 2025).

    w_{k+1} = min(1, w_k p_k(x_k)/q_k(x_k)), and h_k = S_k/(S_k + 1 - w_k). `thresholds[:, k - 1]`
    is h_k, the chance that the first k tokens stand given that no longer prefix does.
    """
    ratio = _ratio(draft, p)
    K = draft.tokens.shape[1]
    w = [torch.ones_like(p[:, 0, 0])]
    for k in range(K):  # once 0, always 0: not 0 x infinity
        w.append(torch.where(w[-1] > 0, w[-1] * ratio[:, k], 0).clamp(max=1))
    weight = torch.stack(w, dim=1)
    total = weight.clone()  # S_k where q_k = 0: w_k itself
    if K > 1 and draft.probs is None:
        total[:, 1:K] = weight[:, 1:K] * (1 - ratio[:, 1:])
    elif K > 1:
        total[:, 1:K] = _excess(draft, p, weight)
    inside = torch.arange(K + 1, device=p.device) < draft.sizes[:, None]
    total = torch.where(inside, total, weight)
    room = total + 1 - weight
    h = torch.where(room > 0, total / room, 1)[:, 1:]
    return Plan(torch.where(counted(draft), h, 0), weight, draft, p)


def _excess(
    draft: Draft, p: Float[Tensor, "B N V"], weight: Float[Tensor, "B N"]
) -> Float[Tensor, "B K-1"]:
    """sum (w_k p_k - q_k)+ for k from 1 to K - 1; outside the draft's columns it is w_k p_k."""
    assert draft.probs is not None
    K = draft.tokens.shape[1]
    p = p[:, 1:K]
    scale = weight[:, 1:K]
    columns = draft.columns
    inside = p if columns is None else p[..., columns]
    excess = scale[..., None] * inside - draft.probs[:, 1:].to(p.dtype)
    total = excess.clamp(min=0).sum(-1)
    if columns is None:
        return total
    return total + scale * p.index_fill(-1, columns, 0).sum(-1)


def match_plan(draft: Draft, p: Float[Tensor, "B N V"]) -> Plan:
    """The law of `match`: the draft, however it came about, is a point mass."""
    return token_plan(Draft(draft.tokens, None, draft.size), p)


def _emit(draft: Draft, accepted: Int[Tensor, "B"], following: Int[Tensor, "B"]) -> Verification:
    N = draft.tokens.shape[1] + 1
    index = torch.arange(N, device=accepted.device).expand(len(accepted), -1)
    n = accepted[:, None]
    tokens = torch.where(index < n, torch.nn.functional.pad(draft.tokens, (0, 1)), 0)
    return Verification(accepted, torch.where(index == n, following[:, None], tokens), index)


def token(draft: Draft, p: Float[Tensor, "B N V"], noise: Noise) -> Verification:
    """Accept the longest prefix whose every token passes; draw from the residual at its end.

    In a tree: `verify_tree.rejection`, or `match` if its nodes are point masses, which is as likely
    to accept them and reads nothing else.
    """
    if draft.parents is not None:
        rule = match if draft.probs is None else verify_tree.rejection
        return rule(draft, p, noise)
    plan = token_plan(draft, p)
    passed = noise.uniform(Purpose.RATIO, draft.tokens.shape[1]) < plan.thresholds
    accepted = passed.long().cumprod(1).sum(1)
    return _emit(draft, accepted, _residual_token(plan, accepted, noise))


def block(draft: Draft, p: Float[Tensor, "B N V"], noise: Noise) -> Verification:
    """Accept the longest prefix that passes, judged as wholes from the longest down.

    In expectation it never accepts fewer tokens than `token`. Raises UsageError for a tree.
    """
    if draft.parents is not None:
        refuse_trees("block")
    K = draft.tokens.shape[1]
    plan = block_plan(draft, p)
    passed = noise.uniform(Purpose.RATIO, K) < plan.thresholds
    lengths = passed * torch.arange(1, K + 1, device=p.device)
    accepted = lengths.amax(1) if K else draft.tokens.new_zeros(len(p))
    return _emit(draft, accepted, _residual_token(plan, accepted, noise))


def _residual_token(plan: Plan, accepted: Int[Tensor, "B"], noise: Noise) -> Int[Tensor, "B"]:
    return draw(plan.residual(accepted), noise.uniform(Purpose.RESIDUAL, 1)[:, 0])


def match(draft: Draft, p: Float[Tensor, "B N V"], noise: Noise) -> Verification:
    """Sample the target's own y_k ~ p_k, accept while the draft agrees; lossless for any draft.

    The draws are keyed by position alone, so the text depends on target, prompt and seed, and on
    no drafter.
    """
    uniform = noise.uniform(Purpose.TARGET, p.shape[1])
    if draft.parents is not None:
        uniform = uniform.gather(1, depths(draft))
    return agree(draft, draw(p, uniform))


def match_gumbel(draft: Draft, p: Float[Tensor, "B N V"], noise: Noise) -> Verification:
    """`match` with y_k = argmax(log p_k + Gumbel noise).

    A drafter may share that noise on purpose, to agree more often.
    """
    gumbel = noise.shared(p.shape[1], p.shape[2]).to(p.dtype)
    if draft.parents is not None:
        gumbel = gumbel.gather(1, depths(draft)[..., None].expand_as(gumbel))
    return agree(draft, (p.log() + gumbel).argmax(-1))


def agree(draft: Draft, own: Int[Tensor, "B N"]) -> Verification:
    """Accept while the draft is the target's own token, then emit that.

    With the most likely tokens this is what every verifier here does at temperature 0.
    """
    if draft.parents is not None:
        return verify_tree.agree(draft, own)
    accepted = ((draft.tokens == own[:, :-1]) & counted(draft)).long().cumprod(1).sum(1)
    return _emit(draft, accepted, own.gather(1, accepted[:, None])[:, 0])


def refuse_trees(name: str) -> None:
    """Raises UsageError: this verifier takes chains only."""
    raise UsageError(
        f"the verifier {name!r} takes no trees: judging a tree from its leaves up (traversal) is "
        "exact only if every subtree was drawn independently, and nodes of one network pass were "
        "not; use token, match or match-gumbel",
        param="verifier",
    )


PLANS = {"token": token_plan, "block": block_plan, "match": match_plan, "match-gumbel": match_plan}
VERIFIERS: dict[str, Verifier] = {
    "token": token,
    "block": block,
    "match": match,
    "match-gumbel": match_gumbel,
}


def verifier(name: str) -> Verifier:
    """The verifier called `name`. Raises UsageError listing the known ones."""
    if name not in VERIFIERS:
        raise UsageError(
            f"unknown verifier {name!r}; known are {', '.join(VERIFIERS)}", param="verifier"
        )
    return VERIFIERS[name]
