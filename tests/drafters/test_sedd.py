"""SEDD as a drafter: its canvas, time and cache, and exact probabilities."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from specdiff.drafters import sedd as module
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.errors import DrafterError, UsageError
from specdiff.noise import Noise
from specdiff.types import Batch, Context, Draft, TargetInfo

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [7], [2, 7, 1, 8, 2])
SHAPES: dict[str, dict[str, Any]] = {
    "windowed": {},
    "windowed-narrow": {"window": 4},
    "windowed-draft-vocab": {"borrow_embeddings": True, "draft_vocab_size": 20},
    "cached": tiny.CACHED,
    "cached-banded": {**tiny.CACHED, "context_window": 4},
    "cached-own": {"attention": "causal-context", "time_conditioning": False},
}


UNIFORM: dict[str, Any] = {"process": "uniform", "scale_by_sigma": False, "schedule": "geometric"}


def info(**changes: Any) -> TargetInfo:
    generator = torch.Generator().manual_seed(9)
    embedding, head = torch.randn(2, tiny.VOCAB, tiny.WIDTH, generator=generator)
    base = TargetInfo(
        "tiny",
        tiny.VOCAB,
        tiny.WIDTH,
        2,
        256,
        torch.float32,
        torch.device("cpu"),
        embedding,
        head / 4,
    )
    return replace(base, **changes)


def context(batch: Batch) -> Context:
    return Context(batch, None, torch.zeros_like(batch.length), None)


def propose(
    drafter: Any, batch: Batch, draft_len: int, state: Any = None, **sampling: Any
) -> Draft:
    """A draft, its probabilities over all ids."""
    if state is None:
        state = drafter.open(len(batch.length), batch.ids.shape[1] + draft_len + 1)
        drafter.admit(state, context(batch), torch.arange(len(batch.length)))
    with torch.inference_mode():
        draft = drafter.propose(context(batch), state, Noise.of(batch), draft_len)
    return replace(draft, probs=draft.full_probs(tiny.VOCAB), columns=None)


def committed(batch: Batch, rows: list[list[int]]) -> Batch:
    """The batch after each row was given more tokens: what `decode` would do."""
    ids, length = batch.ids.clone(), batch.length.clone()
    for b, new in enumerate(rows):
        ids[b, length[b] : length[b] + len(new)] = torch.tensor(new, dtype=torch.long)
        length[b] += len(new)
    return replace(batch, ids=ids, length=length, round=batch.round + 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_q_is_a_law_over_the_draft_vocabulary(shape: str, steps: int) -> None:
    drafter = tiny.drafter(info(), steps=steps, **SHAPES[shape])
    batch = tiny.batch_of(PROMPTS)
    draft = propose(drafter, batch, 6)
    assert draft.tokens.shape == (3, 6)
    assert draft.probs is not None
    assert draft.probs.shape == (3, 6, tiny.VOCAB)
    torch.testing.assert_close(draft.probs.sum(-1), torch.ones(3, 6), rtol=0, atol=1e-5)
    assert (draft.probs >= 0).all()
    assert (draft.probs.gather(-1, draft.tokens[..., None]) > 0).all()
    network = drafter.denoiser.model
    if network.config.draft_vocab_size is not None:
        outside = torch.ones(tiny.VOCAB, dtype=torch.bool)
        outside[network.draft_vocab] = False
        assert (draft.probs[..., outside] == 0).all()
        assert (draft.probs[..., ~outside] > 0).all()
        assert torch.isin(draft.tokens, network.draft_vocab).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_row_drafts_the_same_alone(shape: str, steps: int) -> None:
    drafter = tiny.drafter(info(), steps=steps, **SHAPES[shape])
    together = propose(drafter, tiny.batch_of(PROMPTS), 5)
    for row, prompt in enumerate(PROMPTS):
        alone = propose(drafter, tiny.batch_of([prompt], seeds=[row]), 5)
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()
        torch.testing.assert_close(alone.probs[0], together.probs[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_later_groups_condition_on_earlier_ones(shape: str) -> None:
    """left-to-right: each group's q depends on the committed tokens and earlier groups, only."""
    drafter = tiny.drafter(info(), steps=3, **SHAPES[shape])
    batch = tiny.batch_of(PROMPTS)
    draft = propose(drafter, batch, 7)
    denoiser = drafter.denoiser
    for group in torch.arange(7).tensor_split(3):
        canvas = torch.where(torch.arange(7) < group[0], draft.tokens, denoiser.mask_id)
        state = denoiser.open(3, 96)
        denoiser.admit(state, context(batch), torch.arange(3))
        with torch.inference_mode():
            logits = denoiser.denoise(
                context(batch), state, canvas, (torch.arange(7) < group[0]).expand(3, 7)
            )
        q = Draft(canvas, logits.softmax(-1), columns=denoiser.columns).full_probs(tiny.VOCAB)
        torch.testing.assert_close(draft.probs[:, group], q[:, group], rtol=0, atol=1e-5)


def test_one_shot_is_one_pass_and_t_steps_are_t_passes() -> None:
    drafter = tiny.drafter(info())
    denoiser, calls = drafter.denoiser, []
    whole = denoiser.denoise
    denoiser.denoise = lambda *arguments: (
        calls.append(arguments[3][0].sum().item()) or whole(*arguments)
    )
    for steps, expected in [
        (1, [0]),
        (2, [0, 3]),
        (3, [0, 2, 4]),
        (6, [0, 1, 2, 3, 4, 5]),
        (9, [0, 1, 2, 3, 4, 5]),
    ]:
        calls.clear()
        propose(DenoisingDrafter(denoiser, steps=steps), tiny.batch_of(PROMPTS), 6)
        assert calls == expected


def test_draft_temperature() -> None:
    """0 gives point masses on the likeliest token; the request's own temperature multiplies in."""
    batch = tiny.batch_of(PROMPTS)
    soft = propose(tiny.drafter(info()), batch, 4)
    hard = propose(tiny.drafter(info(), draft_temperature=0.0), batch, 4)
    assert torch.equal(hard.tokens, soft.probs.argmax(-1))
    assert hard.probs is None
    greedy = propose(tiny.drafter(info()), tiny.batch_of(PROMPTS, temperature=0.0), 4)
    assert greedy.probs is None and torch.equal(greedy.tokens, hard.tokens)
    mixed = tiny.batch_of(PROMPTS)
    cold = torch.tensor([1.0, 0.0, 1.0])
    params = replace(mixed.params, temperature=cold, active=frozenset({"temperature", "greedy"}))
    mixed = propose(tiny.drafter(info()), replace(mixed, params=params), 4)
    assert torch.equal(mixed.tokens[1], hard.tokens[1])
    one_hot = torch.nn.functional.one_hot(hard.tokens[1], tiny.VOCAB).float()
    assert torch.equal(mixed.probs[1], one_hot)
    assert torch.equal(mixed.probs[[0, 2]], soft.probs[[0, 2]])
    sharp = propose(
        tiny.drafter(info(), draft_temperature=0.5), tiny.batch_of(PROMPTS, temperature=0.5), 4
    )
    torch.testing.assert_close(
        sharp.probs, soft.probs.pow(4) / soft.probs.pow(4).sum(-1, keepdim=True), rtol=0, atol=1e-5
    )


def test_the_requests_filters_shape_q() -> None:
    draft = propose(tiny.drafter(info()), tiny.batch_of(PROMPTS, top_k=3), 4)
    assert ((draft.probs > 0).sum(-1) == 3).all()


def listened(drafter: Any) -> list[Tensor]:
    """The sigmas the network is called with, one a pass."""
    heard: list[Tensor] = []
    network = drafter.denoiser.model
    whole = network.hidden
    vars(network)["hidden"] = lambda ids, sigma, **arguments: (
        heard.append(sigma) or whole(ids, sigma, **arguments)
    )
    return heard


@pytest.mark.parametrize("window", [None, 4])
def test_the_time_of_the_canvas(window: int | None) -> None:
    """1 - e^-sigma(t) = m/L over the unpadded positions, clamped to t = 1, anew in each pass."""
    drafter = tiny.drafter(info(), steps=3, window=window)
    heard = listened(drafter)
    propose(drafter, tiny.batch_of(PROMPTS), 6)
    assert len(heard) == 3
    for step, sigma in enumerate(heard):
        for row, prompt in enumerate(PROMPTS):
            masked, length = 6 - 2 * step, min(len(prompt), window or 128) + 6
            t = min(1.0, masked / ((1 - 1e-3) * length))
            assert sigma[row].item() == pytest.approx(-math.log(1 - (1 - 1e-3) * t), rel=1e-5)
            assert 1 - math.exp(-sigma[row].item()) == pytest.approx(
                min(0.999, masked / length), rel=1e-5
            )


def test_the_time_of_the_canvas_geometric() -> None:
    drafter = tiny.drafter(info(), schedule="geometric", sigma_min=1e-3, sigma_max=6.0)
    heard = listened(drafter)
    propose(drafter, tiny.batch_of(PROMPTS), 6)
    for row, prompt in enumerate(PROMPTS):
        assert 1 - math.exp(-heard[0][row].item()) == pytest.approx(6 / (len(prompt) + 6), rel=1e-4)


def test_the_canvas_reads_no_further_than_its_window() -> None:
    """A token before the window changes nothing, the first inside it does."""
    for shape in ({"window": 4}, {**tiny.CACHED, "context_window": 4, "n_blocks": 1}):
        drafter = tiny.drafter(info(), **shape)
        before = propose(drafter, tiny.batch_of([PROMPTS[0]]), 5).probs
        for position, changes in [(7, False), (8, True)]:
            other = [*PROMPTS[0]]
            other[position] = (other[position] + 1) % tiny.VOCAB
            after = propose(drafter, tiny.batch_of([other]), 5).probs
            assert (not torch.equal(before, after)) is changes


def test_a_long_prompt_fits_the_networks_length() -> None:
    drafter = tiny.drafter(info(), length=16)
    draft = propose(drafter, tiny.batch_of([list(range(40))]), 6)
    assert draft.tokens.shape == (1, 6)
    with pytest.raises(UsageError, match=r"draft_len 16.*16 positions"):
        propose(drafter, tiny.batch_of([list(range(40))]), 16)


def banded(drafter: Any, batch: Batch, canvas: Tensor) -> Tensor:
    """Logits from one pass over everything: causal context, bidirectional canvas."""
    network, window, K = drafter.denoiser.model, drafter.denoiser.window, canvas.shape[1]
    rows = []
    for b, n in enumerate(batch.length.tolist()):
        ids = torch.cat([batch.ids[b, :n], canvas[b]])[None]
        mask = torch.zeros(n + K, n + K, dtype=torch.bool)
        for i in range(n + K):
            for j in range(n + K):
                visible = j <= i and (window is None or j > i - window)
                mask[i, j] = visible if i < n else j >= n - (window or n)
        with torch.no_grad():
            states = network.hidden(ids, torch.zeros(1), mask=mask[None, None])
            rows.append(network.logits(states[:, n:])[0])
    return torch.stack(rows)


@pytest.mark.parametrize("shape", ["cached", "cached-banded", "cached-own"])
@pytest.mark.parametrize("chunk", [512, 3])
def test_incremental_equals_recomputed(
    shape: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over rounds of uneven progress, partly revealed canvases, and stale entries of a long one."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    drafter = tiny.drafter(info(), **SHAPES[shape] | {"time_conditioning": False})
    denoiser, batch = drafter.denoiser, tiny.batch_of(PROMPTS, max_tokens=40)
    state = denoiser.open(3, 64)
    denoiser.admit(state, context(batch), torch.arange(3))
    generator = torch.Generator().manual_seed(4)
    for K, new in [
        (5, (1, 6, 2)),
        (16, (1, 1, 1)),
        (3, (4, 1, 0)),
        (4, (5, 2, 1)),
        (1, (1, 2, 1)),
        (8, (1, 1, 1)),
    ]:
        prefix = torch.arange(K) < K // 2
        masked = torch.full((3, K), denoiser.mask_id)
        revealed = torch.where(
            prefix, torch.randint(tiny.VOCAB, (3, K), generator=generator), masked
        )
        for canvas, flags in ((masked, torch.zeros(K, dtype=torch.bool)), (revealed, prefix)):
            fresh = denoiser.open(3, 64)
            denoiser.admit(fresh, context(batch), torch.arange(3))
            with torch.inference_mode():
                cached = denoiser.denoise(context(batch), state, canvas, flags.expand(3, K))
                again = denoiser.denoise(context(batch), fresh, canvas, flags.expand(3, K))
            torch.testing.assert_close(cached, again, rtol=0, atol=1e-5)
            full = banded(drafter, batch, canvas)
            torch.testing.assert_close(cached, full[..., : tiny.VOCAB], rtol=0, atol=2e-5)
        drawn = [torch.randint(tiny.VOCAB, (n,), generator=generator).tolist() for n in new]
        batch = committed(batch, drawn)


def test_a_new_request_forgets_the_rows_old_one() -> None:
    drafter = tiny.drafter(info(), **tiny.CACHED)
    old = tiny.batch_of(PROMPTS)
    state = drafter.open(3, 64)
    drafter.admit(state, context(old), torch.arange(3))
    propose(drafter, old, 6, state)
    row, joined = torch.tensor([0]), tiny.batch_of([[8, 8, 1]], seeds=[5])
    drafter.release(state, row)
    batch = old.with_rows(row, joined)
    drafter.admit(state, context(batch), row)
    together, alone = propose(drafter, batch, 6, state), propose(drafter, joined, 6)
    torch.testing.assert_close(together.probs[0], alone.probs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        together.probs[2], propose(drafter, old, 6).probs[2], rtol=0, atol=1e-5
    )


def test_two_streams_never_meet() -> None:
    """Interleaved runs of one drafter over different prompts: what changes lives in the states."""
    drafter = tiny.drafter(info(), steps=2, **tiny.CACHED)
    first, second = tiny.batch_of([PROMPTS[0]]), tiny.batch_of([PROMPTS[2]])
    states = [drafter.open(1, 64), drafter.open(1, 64)]
    for state, batch in zip(states, (first, second), strict=True):
        drafter.admit(state, context(batch), torch.arange(1))
    for new in ([4, 4], [1]):
        for state, batch in zip(states, (first, second), strict=True):
            torch.testing.assert_close(
                propose(drafter, batch, 4, state).probs,
                propose(drafter, batch, 4).probs,
                rtol=0,
                atol=1e-5,
            )
        first, second = committed(first, [new]), committed(second, [new[::-1]])


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"tokens": 47}, {}, DrafterError, "47 tokens.*'tiny' has 48"),
        ({}, {"window": 0}, UsageError, "window must be at least 1, not 0"),
        (
            {"attention": "causal-context", "context_window": 8},
            {"window": 4},
            UsageError,
            "window=4.*8",
        ),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused(
    changes: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    network = tiny.sedd(tiny.sedd_config(**changes))
    with pytest.raises(error, match=message):
        SEDDDenoiser(network, info(), **options)


@pytest.mark.parametrize("part", ["embedding", "head"])
def test_borrowing_from_a_target_without_is_refused(part: str) -> None:
    network = tiny.sedd(tiny.sedd_config(borrow_embeddings=True))
    with pytest.raises(
        DrafterError, match="borrows its target's embedding and head, which 'tiny' does not offer"
    ):
        SEDDDenoiser(network, info(**{part: None}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"order": "any"}, "unknown order 'any'; known are one-shot, left-to-right"),
        ({"order": "one-shot", "steps": 2}, "steps=2 needs order 'left-to-right'"),
        ({"draft_temperature": -1.0}, "draft_temperature.*-1.0"),
        ({"draft_temperature": math.nan}, "draft_temperature.*nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    denoiser = tiny.drafter(info()).denoiser
    with pytest.raises(UsageError, match=message):
        DenoisingDrafter(denoiser, **options)


@pytest.mark.parametrize("order", ["one-shot", "left-to-right"])
def test_the_uniform_process_has_no_mask_to_reveal(order: str) -> None:
    denoiser = SEDDDenoiser(tiny.sedd(tiny.sedd_config(**UNIFORM)), info())
    with pytest.raises(
        UsageError,
        match=f"order '{order}' reveals MASK.*uniform process has none; it takes order 'any'",
    ):
        DenoisingDrafter(denoiser, order=order, steps=1 + (order != "one-shot"))


def test_a_cached_context_cannot_depend_on_time() -> None:
    with pytest.raises(DrafterError, match="time_conditioning false"):
        tiny.drafter(info(), **{**tiny.CACHED, "time_conditioning": True})


ANY: dict[str, dict[str, Any]] = SHAPES | {
    "uniform": UNIFORM,
    "denoiser": {"output": "denoiser"},
    "cached-denoiser": {**tiny.CACHED, "output": "denoiser"},
}


def any_order(shape: str, **options: Any) -> AnyOrderDrafter[Any]:
    changes = {**ANY[shape]}
    window = changes.pop("window", None)
    return AnyOrderDrafter(
        SEDDDenoiser(tiny.sedd(tiny.sedd_config(tiny.VOCAB, **changes)), info(), window=window),
        **options,
    )


@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("shape", ANY)
def test_any_order_hands_on_point_masses_of_real_tokens(shape: str, sampler: str) -> None:
    """T passes; a row drafts the same alone; no token is MASK or outside the draft vocabulary."""
    drafter = any_order(shape, steps=3, sampler=sampler)
    scorer, calls = drafter.scorer, []
    whole = scorer.log_score
    scorer.log_score = lambda *arguments: calls.append(arguments[3]) or whole(*arguments)
    together = propose(drafter, tiny.batch_of(PROMPTS), 5)
    assert together.probs is None and together.size is None and len(calls) == 3
    assert ((together.tokens >= 0) & (together.tokens < tiny.VOCAB)).all()
    assert (calls[0] > calls[1]).all() and (calls[1] > calls[2]).all()
    if scorer.model.config.draft_vocab_size is not None:
        assert torch.isin(together.tokens, scorer.model.draft_vocab).all()
    for row, prompt in enumerate(PROMPTS):
        assert (
            propose(drafter, tiny.batch_of([prompt], seeds=[row]), 5).tokens[0].tolist()
            == together.tokens[row].tolist()
        )


@pytest.mark.parametrize("shape", ["windowed", "uniform"])
def test_any_order_starts_at_the_time_of_the_canvas(shape: str) -> None:
    drafter = any_order(shape, steps=2)
    heard: list[Tensor] = []
    whole = drafter.scorer.log_score
    drafter.scorer.log_score = lambda *arguments: heard.append(arguments[3]) or whole(*arguments)
    propose(drafter, tiny.batch_of(PROMPTS), 6)
    for row, prompt in enumerate(PROMPTS):
        assert 1 - math.exp(-heard[0][row].item()) == pytest.approx(6 / (len(prompt) + 6), rel=1e-4)
        assert heard[1][row].item() == pytest.approx(
            drafter.scorer.schedule.total(torch.tensor(1e-5)).item(), rel=1e-3
        )


def test_one_pass_of_any_order_is_a_one_shot_draft() -> None:
    """The closing step over the whole noise is the denoiser's law: same uniforms, same tokens."""
    one_shot, batch = (
        tiny.drafter(info(), output="denoiser"),
        tiny.batch_of(PROMPTS, temperature=0.7, top_k=5),
    )
    drafter = AnyOrderDrafter(one_shot.denoiser)
    assert propose(drafter, batch, 6).tokens.tolist() == propose(one_shot, batch, 6).tokens.tolist()
    greedy = tiny.batch_of(PROMPTS, temperature=0.0)
    assert (
        propose(drafter, greedy, 6).tokens.tolist() == propose(one_shot, greedy, 6).tokens.tolist()
    )


def test_a_denoisers_score_is_its_law_over_the_odds_of_a_mask() -> None:
    network, sigma = tiny.sedd(tiny.sedd_config(output="denoiser")), torch.tensor([0.3, 4.0])
    ids = torch.tensor([[3, tiny.VOCAB, 5], [tiny.VOCAB, tiny.VOCAB, 1]])
    with torch.no_grad():
        logits, log_score = network.logits(network.hidden(ids, sigma)), network(ids, sigma)
    expected = logits[..., : tiny.VOCAB].softmax(-1) / torch.expm1(sigma)[:, None, None]
    masked = ids == tiny.VOCAB
    torch.testing.assert_close(
        log_score.exp()[masked][:, : tiny.VOCAB], expected[masked], rtol=1e-4, atol=1e-7
    )
    assert (log_score.gather(-1, ids[..., None]) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"sampler": "magic"}, "unknown sampler 'magic'; known are analytic, euler"),
    ],
)
def test_any_order_refuses_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        any_order("windowed", **options)


def test_the_folder_names_the_order(tmp_path: Any) -> None:
    tiny.sedd(tiny.sedd_config(**UNIFORM)).save_pretrained(tmp_path / "uniform")
    tiny.sedd(tiny.sedd_config()).save_pretrained(tmp_path / "absorb")
    assert isinstance(module.sedd(info(), tmp_path / "uniform", steps=3), AnyOrderDrafter)
    assert module.sedd(info(), tmp_path / "absorb", order="any", sampler="euler").sampler == "euler"
    with pytest.raises(
        UsageError, match="unknown order 'random'; known are one-shot, left-to-right, any"
    ):
        module.sedd(info(), tmp_path / "absorb", order="random")
    with pytest.raises(
        UsageError, match="sampler 'euler' runs the reverse process, which only order 'any' does"
    ):
        module.sedd(info(), tmp_path / "absorb", sampler="euler")
