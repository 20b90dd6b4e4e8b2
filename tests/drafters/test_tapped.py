"""SEDD over its target's hidden states: cached decoding, reused prefixes, checkpoints, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from specdiff import catalog, decode
from specdiff.drafters import tapped
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.base import Drafter, DrafterWrapper
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.engine import Request, run, serve
from specdiff.errors import ConfigError, DrafterError
from specdiff.nn.ddit import SEDD
from specdiff.noise import Noise
from specdiff.types import Context, Draft, SamplingParams
from specdiff.verify import VERIFIERS

K = 4
WINDOW = 6
TAPPED: dict[str, Any] = {**tiny.CACHED, "taps": (0,), "context_window": WINDOW}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [7], [2, 7, 1, 8, 2]]
TARGET = tiny.target("llama")
INFO = TARGET.info


def network(seed: int = 0, **changes: Any) -> SEDD:
    return tiny.sedd(tiny.sedd_config(**{**TAPPED, **changes}), seed)


def denoiser(**changes: Any) -> SEDDDenoiser:
    return SEDDDenoiser(network(**changes), INFO, draft_len=K)


class Recording(DrafterWrapper[Any]):
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


def recomputed(net: SEDD, features: list[Tensor], ids: list[int], drafted: Tensor) -> Tensor:
    """q [K, C] from one pass over the whole text, `drafted` being the tokens shown."""
    end = len(ids) - 1
    extra = torch.zeros(1, end + 1 + K, tiny.WIDTH)
    if end:
        context = net.context(torch.stack(features[:end])[None])
        extra[:, :end] = context
        extra[:, end:] = net.direct(context[:, -1:])
    text = torch.cat([torch.tensor(ids), drafted])[None]
    query = torch.arange(end + 1 + K)[:, None]
    key = torch.arange(end + 1 + K)
    past = (key <= query) & (key > query - WINDOW)
    block = key >= end - WINDOW
    mask = torch.where(query < end, past, block)
    states = net.hidden(text, torch.zeros(1), mask=mask[None, None], extra=extra)
    return net.logits(states[0, end + 1 :])


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("steps", [1, 2])
@torch.inference_mode()
def test_cached_decoding_equals_one_pass_over_the_whole_text(
    steps: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tapped, "CHUNK", chunk)
    drafter = Recording(DenoisingDrafter(denoiser(), steps=steps))
    batch = tiny.batch_of(PROMPTS, 14)
    rounds = list(decode.decode(TARGET, drafter, batch, verifier=VERIFIERS["token"], draft_len=K))
    assert len({int(n) for r in rounds for n in r.emitted}) > 2
    net = drafter.inner.denoiser.model
    size = K // steps
    for row, ids, b, draft in drafter.drafts:
        assert draft.probs is not None
        for first in range(0, K, size):
            shown = draft.tokens[b].clone()
            shown[first:] = tiny.VOCAB
            q = recomputed(net, drafter.features[row], ids, shown).softmax(-1)
            group = slice(first, first + size)
            torch.testing.assert_close(draft.probs[b, group], q[group], rtol=0, atol=2e-5)


@torch.inference_mode()
def test_rows_have_room_for_the_padding_of_others() -> None:
    """The caches grow by need, and may have far fewer positions than they were opened with."""
    batch = tiny.batch_of(PROMPTS, 14)
    run = decode.start(TARGET, DenoisingDrafter(denoiser()), batch, slots=900)
    decode.admit(run, torch.arange(len(PROMPTS)))
    for _ in range(3):
        decode.step(run, K)
    assert not bool(run.state.off.any())


@pytest.mark.parametrize("draft_len", [1, 4, 7])
def test_greedy_text_is_the_targets(draft_len: int) -> None:
    batch = tiny.batch_of(PROMPTS, 24, temperature=0.0)
    for drafter in (
        DenoisingDrafter(denoiser(), steps=min(2, draft_len)),
        DenoisingDrafter(denoiser(), hot_start="canvas"),
        AnyOrderDrafter(denoiser(), steps=2),
    ):
        texts = tiny.decoded(TARGET, drafter, batch, draft_len=draft_len)
        assert texts == [tiny.plain(tiny.model("llama"), prompt, 24) for prompt in PROMPTS]


def answers(drafter: Drafter[Any], requests: list[Request], rows: int) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in requests]
    for output in run(
        TARGET, drafter, requests, verifier=VERIFIERS["block"], draft_len=K, rows=rows
    ):
        texts[output.request] += output.tokens
    return texts


class Whole(DrafterWrapper[Any]):
    """The same drafter, reading every prompt whole."""

    def __init__(self, inner: Drafter[Any]) -> None:
        super().__init__(inner)
        self.keeps_features = False


@pytest.mark.parametrize("rows", [1, 3])
def test_a_text_is_the_same_in_any_batch_and_after_a_shared_prefix(rows: int) -> None:
    params = SamplingParams(max_tokens=9)
    first = [Request(prompt, params, i) for i, prompt in enumerate(PROMPTS)]
    drafter = DenoisingDrafter(denoiser(), steps=2)
    assert drafter.keeps_features
    texts = answers(drafter, first, 1)
    later = [
        Request([*r.prompt, *text, 7, 8], params, 10 + i)
        for i, (r, text) in enumerate(zip(first, texts, strict=True))
    ]
    pairs = [request for pair in zip(first, later, strict=True) for request in pair]
    requests = pairs if rows == 1 else [*first, *later]
    alone = [answers(Whole(drafter), [request], 1)[0] for request in requests]
    assert answers(drafter, requests, rows) == alone


def test_a_prompt_that_is_being_read_gives_its_drafter_nothing() -> None:
    """The first request's single token has no feature, and other rows have none to look at."""
    params = SamplingParams(max_tokens=12)
    requests = [Request([7], params, 1), Request([3, 1, 4] * 30, params, 2)]
    drafter = DenoisingDrafter(denoiser())
    target = tiny.target("llama", positions=256)
    texts = [[*request.prompt] for request in requests]
    for step in serve(
        target, drafter, iter(requests), verifier=VERIFIERS["token"], draft_len=K, rows=2,
        slots=200, chunk=20,
    ):  # fmt: skip
        for output in step.outputs():
            assert not output.disabled
            texts[output.request] += output.tokens
    for request, text in zip(requests, texts, strict=True):
        batch = tiny.batch_of([request.prompt], 12, [request.seed])
        assert tiny.decoded(target, drafter, batch, draft_len=K) == [text]


def test_a_checkpoint_keeps_its_taps(tmp_path: Path) -> None:
    saved = network(seed=3, taps=(0, 1))
    saved.save_pretrained(tmp_path)
    loaded = SEDD.from_pretrained(tmp_path)
    assert loaded.config == saved.config and loaded.config.taps == (0, 1)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert "taps" not in tiny.sedd_config().to_json()
    drafter = catalog.drafter(str(tmp_path), INFO, {"steps": 2, "hot_start": 0.2})
    assert drafter.taps == (0, 1) and drafter.keeps_features


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "bidirectional"}, "taps need attention 'causal-context'"),
        ({"time_conditioning": True}, "time_conditioning false"),
        ({"borrow_embeddings": False, "draft_vocab_size": None}, "borrow_embeddings true"),
        ({"taps": (-1,)}, r"taps must be layer numbers >= 0, not \[-1\]"),
    ],
)
def test_what_cannot_have_taps_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.sedd_config(**{**TAPPED, **changes})


def test_a_target_without_these_layers_or_of_another_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DrafterError, match="reads layer 5 of its target, but 'tiny-llama' has 2"):
        denoiser(taps=(0, 5))
    with pytest.raises(ConfigError, match="64"):
        denoiser(hidden_size=64)
    network().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"taps": [\n    0\n  ]', '"taps": "all"'))
    with pytest.raises(ConfigError, match="taps"):
        SEDD.from_pretrained(tmp_path)
