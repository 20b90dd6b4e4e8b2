"""The block drafter: its cached decoding equals one masked pass in the shape of training."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from specdiff import decode
from specdiff.drafters.block import BlockDrafter
from specdiff.models import packed
from specdiff.models.packed import Int8Linear
from specdiff.noise import Noise
from specdiff.types import Batch, Context, Draft, SamplingParams
from specdiff.verify import VERIFIERS

K = 4


class Recording(BlockDrafter):
    """Keeps the features of each position, and every draft with the text it followed."""

    def open(self, rows: int, slots: int) -> Any:
        self.features: list[list[Tensor]] = [[] for _ in range(rows)]
        self.drafts: list[tuple[int, list[int], int, Draft]] = []
        return super().open(rows, slots)

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        assert context.features is not None
        for b, n in enumerate(context.feature_size.tolist()):
            self.features[b] += list(context.features[b, :n])
            ids = context.batch.ids[b, : int(context.batch.length[b])].tolist()
            if not bool(context.batch.done[b]):
                assert len(self.features[b]) == len(ids) - 1  # never the anchor's own
                self.drafts.append((b, ids, b, draft))
        return draft


def recomputed(drafter: Recording, row: int, ids: list[int], tokens: Tensor) -> Tensor:
    """q from one pass over the whole context without a cache."""
    net = drafter.network
    a = len(ids) - 1
    context = net.context(torch.stack(drafter.features[row][:a])[None])
    slots = net.slots(torch.tensor([[ids[-1]]]), context[:, -1:], K)[:, 0]
    positions = torch.arange(a + K)
    key = positions[None]
    mask = ((key >= a) | (key >= a - 9)).expand(K, -1)
    states = net(slots, context, positions[None], mask[None, None])
    previous = torch.cat([torch.tensor([ids[-1]]), tokens[:-1]])
    bias = net.markov(previous)
    assert bias is not None
    logits = net.logits(states)[0] + bias
    return logits.softmax(-1)


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_cached_decoding_equals_a_pass_in_the_shape_of_training(verifier: str) -> None:
    target = tiny.target("llama")
    drafter = Recording(tiny.block(), target.info)
    batch = tiny.batch_of([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [7, 2], [2, 7, 1, 8, 2]])
    with torch.inference_mode():
        rounds = list(decode.decode(target, drafter, batch, verifier=VERIFIERS[verifier]))
        accepted = torch.stack([r.verification.accepted for r in rounds])
        assert int(accepted.max()) > 0 and int(accepted.min()) < K
        for row, ids, b, draft in drafter.drafts:
            assert draft.probs is not None
            expected = recomputed(drafter, row, ids, draft.tokens[b])
            assert torch.allclose(draft.probs[b], expected, atol=1e-5)


@pytest.mark.parametrize("draft_len", [1, 4, 9])
def test_greedy_text_is_the_targets(draft_len: int) -> None:
    target = tiny.target("llama")
    drafter = BlockDrafter(tiny.block(), target.info)
    prompts = tiny.prompts(4)
    texts = tiny.decoded(
        target, drafter, tiny.batch_of(prompts, temperature=0.0), draft_len=draft_len
    )
    plain = tiny.model("llama")
    assert texts == [tiny.plain(plain, prompt, 24) for prompt in prompts]


@pytest.mark.parametrize("width", [251, 256, 300, 500])
@torch.inference_mode()
def test_rows_of_any_width_have_room_for_the_padding_of_others(width: int) -> None:
    """The caches grow in steps of 256 positions, up to the slots they were opened with."""
    target = tiny.target("llama")
    drafter = BlockDrafter(tiny.block(), target.info)
    batch = Batch.of(
        [[3, 1, 4], [5, 9, 2, 6, 5, 3, 5]],
        [SamplingParams(max_tokens=8, temperature=0.0)] * 2,
        [0, 1],
        slots=width,
    )
    run = decode.start(target, drafter, batch, slots=400)
    decode.admit(run, torch.arange(2))
    for _ in range(3):
        decode.step(run, K)
    assert not bool(run.state.off.any())


@torch.inference_mode()
def test_a_bfloat16_target_packs_its_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    info = tiny.target("llama").info
    assert info.embedding is not None and info.head is not None
    info = replace(
        info,
        dtype=torch.bfloat16,
        embedding=info.embedding.bfloat16(),
        head=info.head.bfloat16(),
    )
    plain = BlockDrafter(tiny.block(), info).network
    assert plain.read_out is None  # too small to gain
    monkeypatch.setattr(packed, "LARGE", 1)
    rounded = BlockDrafter(tiny.block(), info).network
    layers = [m for m in rounded.modules() if isinstance(m, Int8Linear)]
    assert rounded.read_out in layers and len(layers) > 2 * 7  # both layers, fc, direct, head
    x = torch.randn(1, 5, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([[4, 9]])
    slots = [net.slots(ids, x[:, :2], K)[0] for net in (plain, rounded)]
    mask = torch.ones(1, 1, K, 5 + K, dtype=torch.bool)
    at = torch.arange(5 + K)[None].expand(2, -1)
    q = []
    for net, entered in zip((plain, rounded), slots, strict=True):
        states = net(entered, net.context(x.expand(2, -1, -1)), at, mask)
        bias = net.markov(ids.T.expand(-1, K))
        assert bias is not None
        q.append((net.logits(states) + bias).softmax(-1))
    distance = (q[0] - q[1]).abs().sum(-1) / 2
    assert 0 < float(distance.max()) < 0.05
