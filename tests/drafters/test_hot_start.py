"""Hot starts of real networks: what is mixed and what is shown, specs, and bad options."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from specdiff import catalog, decode
from specdiff.drafters.base import Drafter, DrafterWrapper
from specdiff.drafters.block import BlockDrafter
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.hot_start import CONFIDENT, HotStart, LastDraft
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.types import Context, Draft
from specdiff.verify import VERIFIERS

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [7, 2], [2, 7, 1, 8, 2]]
TARGET = tiny.target("llama")
INFO = TARGET.info
SHAPES: dict[str, dict[str, Any]] = {"windowed": {}, "cached": tiny.CACHED}


class Watched(DrafterWrapper[Any]):
    """Keeps what each draft followed, the draft, and what the state remembers of it."""

    def open(self, rows: int, slots: int) -> Any:
        self.drafts: list[tuple[Context, Draft, LastDraft]] = []
        return super().open(rows, slots)

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        self.drafts.append((context, draft, state.history.last))
        return draft


def drafts_of(drafter: Drafter[Any], new: int) -> list[tuple[Context, Draft, LastDraft]]:
    watched = Watched(drafter)
    batch = tiny.batch_of(PROMPTS, new)
    rounds = decode.decode(TARGET, watched, batch, verifier=VERIFIERS["token"], draft_len=4)
    assert len(list(rounds)) == len(watched.drafts)
    return watched.drafts


def running(context: Context) -> list[int]:
    rows: list[int] = (~context.batch.done).nonzero()[:, 0].tolist()
    return rows


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_both_predictions_of_a_position_are_mixed(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tiny.drafter(INFO, **SHAPES[shape]).denoiser
    cold: list[Tensor] = []
    denoise = inner.denoise

    def recorded(*arguments: Any) -> Tensor:
        cold.append(denoise(*arguments))
        return cold[-1]

    monkeypatch.setattr(inner, "denoise", recorded)
    drafts = drafts_of(DenoisingDrafter(inner, hot_start=0.4), 12)
    hot = 0
    last: LastDraft | None = None
    for (context, draft, memory), predictions in zip(drafts, cold, strict=True):
        assert draft.probs is not None
        for row, k in product(running(context), range(4)):
            logits = predictions[row, k]
            place = 4 if last is None else int(context.batch.length[row] - last.start[row]) + k
            if last is not None and place < 4:
                logits = 0.6 * logits + 0.4 * last.values[row, place]
                hot += 1
            torch.testing.assert_close(draft.probs[row, k], logits.softmax(-1))
        last = memory
    assert hot > 10


@torch.inference_mode()
def test_a_canvas_shows_the_network_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tiny.drafter(INFO).denoiser
    shown: list[tuple[Tensor, Tensor]] = []
    denoise = inner.denoise

    def recorded(context: Context, state: Any, canvas: Tensor, revealed: Tensor) -> Tensor:
        shown.append((canvas, revealed))
        return 6 * denoise(context, state, canvas, revealed)  # so that tokens are certain enough

    monkeypatch.setattr(inner, "denoise", recorded)
    drafter = DenoisingDrafter(inner, hot_start="canvas", draft_temperature=0.5)
    drafts = drafts_of(drafter, 16)
    kept = 0
    for (_, _, last), (context, draft, _), (canvas, revealed) in zip(
        drafts, drafts[1:], shown[1:], strict=False
    ):
        assert draft.probs is not None
        for row, k in product(running(context), range(4)):
            place = int(context.batch.length[row] - last.start[row]) + k
            sure = place < 4 and float(last.values[row, place, 0]) >= CONFIDENT
            assert bool(revealed[row, k]) == sure
            if not sure:
                assert canvas[row, k] == inner.mask_id
                continue
            assert canvas[row, k] == last.tokens[row, place] == draft.tokens[row, k]
            assert draft.probs[row, k, draft.tokens[row, k]] == 1
            kept += 1
    assert kept > 3


@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
def test_a_shorter_draft_may_keep_its_whole_canvas(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tiny.drafter(INFO, schedule=schedule).denoiser
    denoise = inner.denoise
    whole: list[bool] = []

    def recorded(context: Context, state: Any, canvas: Tensor, revealed: Tensor) -> Tensor:
        whole.append(bool((revealed.all(1) & ~context.batch.done).any()))
        return 20 * denoise(context, state, canvas, revealed)  # so that tokens are certain enough

    monkeypatch.setattr(inner, "denoise", recorded)
    drafter = DenoisingDrafter(inner, hot_start="canvas")
    rounds = decode.decode(
        TARGET,
        drafter,
        tiny.batch_of(PROMPTS, 24),
        verifier=VERIFIERS["token"],
        draft_len=lambda last: 1 if last and last.draft.tokens.shape[1] > 1 else 6,
    )
    assert not any(bool(last.disabled.any()) for last in rounds)
    assert any(whole)


@pytest.mark.parametrize("verifier", ["token", "block"])
@pytest.mark.parametrize("option", [0.5, "canvas"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_greedy_text_is_the_targets(steps: int, option: float | str, verifier: str) -> None:
    drafter = tiny.drafter(INFO, **tiny.CACHED).denoiser
    hot = DenoisingDrafter(drafter, steps=steps, hot_start=option)
    batch = tiny.batch_of(PROMPTS, 16, temperature=0.0)
    texts = tiny.decoded(TARGET, hot, batch, verifier=VERIFIERS[verifier], draft_len=4)
    assert texts == [tiny.plain(tiny.model("llama"), prompt, 16) for prompt in PROMPTS]


@torch.inference_mode()
def test_a_block_drafter_mixes_what_follows_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both predictions of a position have the Markov head's part, each of its own parent."""
    drafter = BlockDrafter(tiny.block(), INFO, hot_start=0.6)
    network = drafter.network
    cold: list[Tensor] = []
    compute = network.logits

    def recorded(states: Tensor) -> Tensor:
        cold.append(compute(states))
        return cold[-1]

    monkeypatch.setattr(network, "logits", recorded)
    drafts = drafts_of(drafter, 12)
    hot = 0
    last: LastDraft | None = None
    for (context, draft, memory), slots in zip(drafts, cold, strict=True):
        assert draft.probs is not None
        parents = torch.cat([context.batch.anchor[:, None], draft.tokens[:, :-1]], dim=1)
        bias = network.markov(parents)
        assert bias is not None
        for row, k in product(running(context), range(4)):
            logits = (slots + bias)[row, k]
            place = 4 if last is None else int(context.batch.length[row] - last.start[row]) + k
            if last is not None and place < 4:
                logits = 0.4 * logits + 0.6 * last.values[row, place]
                hot += 1
            torch.testing.assert_close(draft.probs[row, k], logits.softmax(-1))
        last = memory
    assert hot > 10


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan, math.inf, "warm", "0.3", True, None])
def test_a_hot_start_out_of_range_is_refused(value: Any) -> None:
    message = r'hot_start must be a weight in \[0, 1\) \(0: a cold start\) or "canvas", not'
    with pytest.raises(UsageError, match=message):
        DenoisingDrafter(tiny.drafter(INFO).denoiser, hot_start=value)
    with pytest.raises(UsageError, match=message):
        BlockDrafter(tiny.block(), INFO, hot_start=value)


def test_what_has_no_canvas_refuses_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hot_start='canvas' needs a canvas, and a block drafter"):
        BlockDrafter(tiny.block(), INFO, hot_start="canvas")
    tiny.sedd(tiny.sedd_config()).save_pretrained(tmp_path)
    for value in (0.3, "canvas"):
        with pytest.raises(UsageError, match="needs order 'one-shot' or 'left-to-right'"):
            catalog.drafter(str(tmp_path), INFO, {"order": "any", "hot_start": value})


def test_options_in_a_spec(tmp_path: Path) -> None:
    tiny.sedd(tiny.sedd_config()).save_pretrained(tmp_path)
    drafter = catalog.drafter(f'{tmp_path}:{{"hot_start": 0.3, "steps": 2}}', INFO, {"steps": 4})
    assert isinstance(drafter, DenoisingDrafter)
    assert drafter.hot_start == HotStart(0.3) and drafter.steps == 4
    behind = catalog.drafter(f'cascade:{tmp_path}:{{"hot_start": "canvas"}}', INFO)
    assert isinstance(behind, CascadeDrafter)
    assert behind.inner.hot_start == HotStart(canvas=True)
    assert catalog.target_of('sedd:{"hot_start": 0.3}') == catalog.DEFAULT_MODEL
    assert catalog.target_of('ngram:{"longest": 2}') == catalog.DEFAULT_MODEL
    with pytest.raises(UsageError, match=r"options of drafter sedd are not valid JSON.*\{hot"):
        catalog.drafter("sedd:{hot", INFO)
    with pytest.raises(UsageError, match="does not take these options"):
        catalog.drafter(f'{tmp_path}:{{"warm": 1}}', INFO)
    with pytest.raises(UsageError, match="'none' takes no options, but got hot_start"):
        catalog.drafter('none:{"hot_start": 0.3}', INFO)
