"""Trees over real attention: every node's logits, the moved path, and greedy text, in float32.

Shapes: N scored rows of a tree.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import tiny
from specdiff import decode
from specdiff.drafters.base import Drafter
from specdiff.drafters.block import BlockTreeDrafter
from specdiff.drafters.tree import TreeDrafter
from specdiff.errors import UnsupportedModelError
from specdiff.models import masks, ragged
from specdiff.models.cache import RaggedCache
from specdiff.models.self_test import tree_test
from specdiff.noise import Noise
from specdiff.targets import causal
from specdiff.targets.causal import CausalTarget
from specdiff.tree import above
from specdiff.types import Context, Draft, Verification
from specdiff.verify import VERIFIERS

PARENTS = torch.tensor([[-1, -1, 0, 1, 1, 4, 5], [-1, 0, 0, 1, -1, 4, 3]])
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7]]
CLOSE = 1e-4


def windowed(family: str) -> PreTrainedModel:
    """Three positions in view of a sliding layer: most of a tree's path slides out."""
    torch.manual_seed(1)
    if family == "mistral":
        config = MistralConfig(
            vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=3,
            max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return MistralForCausalLM(config).eval()
    neo = GPTNeoConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, num_layers=2, num_heads=4, window_size=3,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPTNeoForCausalLM(neo).eval()


def network(family: str) -> PreTrainedModel:
    if family in tiny.FAMILIES:
        return tiny.model(family)
    model = windowed(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


FAMILIES = (*tiny.FAMILIES, "mistral", "gpt_neo")


def tree_error(net: PreTrainedModel) -> float:
    """Of all logits of a tree, and of a chain after its longest path was kept, relatively."""
    plain = copy.deepcopy(net)
    target = CausalTarget(net, "tiny")
    batch = tiny.batch_of(PROMPTS, max_tokens=30)
    cache = target.open(2, 40)
    target.admit(cache, torch.arange(2), [torch.tensor(p) for p in PROMPTS], torch.zeros(2).long())
    tokens = torch.randint(tiny.VOCAB, PARENTS.shape, generator=torch.Generator().manual_seed(7))
    draft = Draft(tokens, parents=PARENTS)
    errors = []

    def compare(text: list[int], logits: Tensor) -> None:
        with torch.inference_mode():
            own = plain(torch.tensor([text]), use_cache=False).logits[0, -1]
        errors.append(float((own - logits).abs().max() / own.abs().max()))

    line = above(draft)
    output = target.score(cache, batch, draft)
    for row, prompt in enumerate(PROMPTS):
        for n in range(PARENTS.shape[1] + 1):
            path = tokens[row][line[row, n]].tolist()
            compare([*prompt, *path], output.logits[row, n])
    # the paths 1, 4, 5, 6 and 0, 1, 3, 6
    path = torch.tensor([[0, 2, 5, 6, 7, 5, 6, 7], [0, 1, 2, 4, 7, 5, 6, 7]])
    accepted = torch.tensor([4, 4])
    texts = [[*p, *(tokens[r, path[r, 1:5] - 1].tolist()), 11] for r, p in enumerate(PROMPTS)]
    target.keep(cache, batch, Verification(accepted, path, path))
    following = tiny.batch_of(texts, max_tokens=20)
    chain = Draft(torch.tensor([[5, 8], [1, 0]]))
    output = target.score(cache, following, chain)
    target.keep(cache, following, Verification(torch.zeros(2).long(), path[:, :3], path[:, :3]))
    for row, text in enumerate(texts):
        for n in range(3):
            compare([*text, *chain.tokens[row, :n].tolist()], output.logits[row, n])
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_has_the_logits_of_its_own_path(family: str) -> None:
    assert tree_error(network(family)) < CLOSE


def test_the_test_of_trees_runs_once_before_the_first() -> None:
    target = CausalTarget(network("mistral"))
    assert target.tree_error is None
    assert tree_test(target.ragged) < CLOSE


# ---- planted bugs ----


@pytest.fixture(params=["siblings", "itself", "anchor", "off by one"])
def wrong_mask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """BUGS: a node attends to the one before it; not to itself; not to the anchor; or the mask is
    shifted by one node."""
    right = masks._tree

    def tree(at: Tensor, slot: Tensor, window: int | None, related: Tensor) -> Tensor:
        changed = related.clone()
        eye = torch.eye(related.shape[1], dtype=torch.bool)
        if request.param == "siblings":
            changed |= eye.roll(1, 0) & ~eye.roll(1, 0).triu()
        elif request.param == "itself":
            changed[:, 1:] &= ~eye[1:]
        elif request.param == "anchor":
            changed[:, 1:, 0] = False
        else:
            changed[:, 2:] = related[:, 1:-1]
            changed |= eye
        return right(at, slot, window, changed)

    monkeypatch.setattr(masks, "_tree", tree)
    return str(request.param)


def test_a_wrong_mask_is_caught(wrong_mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = CausalTarget(network("llama"))
    with pytest.raises(UnsupportedModelError, match=r"scoring trees .* differs"):
        tree_test(target.ragged)
    monkeypatch.setattr(causal, "tree_test", lambda model: 0.0)
    assert tree_error(network("llama")) > 100 * CLOSE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_slots_as_position_ids_are_caught(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "tree_test", lambda model: 0.0)
    forward = ragged.RaggedModel.forward

    def by_slot(self: Any, cache: Any, ids: Tensor, at: Tensor, **options: Any) -> Any:
        return forward(self, cache, ids, at, **{"positions": at, **options})

    monkeypatch.setattr(ragged.RaggedModel, "forward", by_slot)
    assert tree_error(network(family)) > 100 * CLOSE


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_a_window_that_counts_slots_is_caught(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "tree_test", lambda model: 0.0)
    right = masks._tree

    def by_slot(at: Tensor, slot: Tensor, window: int | None, related: Tensor) -> Tensor:
        visible = right(at, slot, None, related)
        return visible if window is None else visible & (slot > at[..., None] - window)[:, None]

    monkeypatch.setattr(masks, "_tree", by_slot)
    assert tree_error(network(family)) > 100 * CLOSE


def test_a_stale_slot_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "tree_test", lambda model: 0.0)
    monkeypatch.setattr(RaggedCache, "move", lambda self, source, to: None)
    assert tree_error(network("llama")) > 100 * CLOSE


def test_a_path_moved_one_slot_too_far_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "tree_test", lambda model: 0.0)
    move = RaggedCache.move
    monkeypatch.setattr(RaggedCache, "move", lambda self, source, to: move(self, source, to + 1))
    assert tree_error(network("llama")) > 100 * CLOSE


# ---- greedy text ----


class HintedTree(Drafter[None]):
    """Knows each row's text. Its nodes alternate with wrong siblings, and every fifth is wrong."""

    trees = True
    draft_len = 9

    def __init__(self, texts: list[list[int]]) -> None:
        self.hinted = tiny.Hinted(texts, tiny.VOCAB)

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        right = self.hinted.propose(context, None, noise, (draft_len + 1) // 2).tokens
        wrong = (right + 7) % tiny.VOCAB
        tokens = torch.stack([wrong, right], dim=2).flatten(1)[:, :draft_len]
        parents = torch.arange(draft_len).div(2, rounding_mode="floor") * 2 - 1
        return Draft(tokens, parents=parents.expand(len(tokens), -1))


@pytest.mark.parametrize("rule", ["token", "match"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_plain_decodings(family: str, rule: str) -> None:
    net = network(family)
    prompts = tiny.prompts(3)
    plain = [tiny.plain(tiny.copy_of(net), prompt, 20) for prompt in prompts]
    batch = tiny.batch_of(prompts, max_tokens=20, temperature=0)
    drafter = HintedTree(plain)
    rounds = list(decode.decode(CausalTarget(net), drafter, batch, verifier=VERIFIERS[rule]))
    assert tiny.rows_of(rounds[-1].batch) == plain
    assert sum(int(last.verification.accepted.sum()) for last in rounds) > 24


def trained(kind: str, target: CausalTarget) -> Drafter[Any]:
    if kind == "block":
        return BlockTreeDrafter(tiny.block(), target.info, 12)
    changes = tiny.CACHED if kind == "sedd cached" else {}
    chain: Any = tiny.drafter(target.info, **changes)
    return TreeDrafter(chain.denoiser, 12)


@pytest.mark.parametrize("kind", ["sedd", "sedd cached", "block"])
def test_trained_drafters_leave_the_text_as_it_is(kind: str) -> None:
    net = tiny.model("llama")
    prompts = tiny.prompts(3)
    plain = [tiny.plain(tiny.copy_of(net), prompt, 20) for prompt in prompts]
    batch = tiny.batch_of(prompts, max_tokens=20, temperature=0)
    target = CausalTarget(net)
    rounds = list(decode.decode(target, trained(kind, target), batch))
    assert tiny.rows_of(rounds[-1].batch) == plain
    assert any(bool((r.draft.parents != torch.arange(-1, 11)).any()) for r in rounds)


def test_features_are_those_of_the_accepted_path() -> None:
    """What a drafter with taps is given belongs to the committed tokens, round by round."""
    net = tiny.model("llama")
    plain = tiny.copy_of(net)
    prompts = tiny.prompts(3)
    texts = [tiny.plain(plain, prompt, 20) for prompt in prompts]

    class Tapped(HintedTree):
        taps = (0,)

    batch = tiny.batch_of(prompts, max_tokens=20, temperature=0)
    state = decode.start(CausalTarget(net), Tapped(texts), batch)
    decode.admit(state, torch.arange(3))
    moved = 0
    while not bool(state.batch.done.all()):
        last = decode.step(state, 9)
        moved += int((last.verification.accepted > 0).sum())
        for row, size in enumerate(state.context.feature_size.tolist()):
            end = int(state.batch.length[row]) - 1
            ids = torch.tensor([texts[row][:end]])
            with torch.inference_mode():
                hidden = plain(ids, output_hidden_states=True).hidden_states[1][0]
            features = state.context.features
            assert features is not None
            assert torch.allclose(features[row, :size], hidden[end - size :], atol=1e-3)
    assert moved > 5
