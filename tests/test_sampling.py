"""Probabilities against transformers' own warpers, and draws against the cumulative sum."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdiff.sampling import PREFIX, draw, probabilities
from specdiff.types import Params, SamplingParams

ALMOST_ONE = float(np.nextafter(1, 0))
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 10_000},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 4},
    {"top_k": 4, "top_p": 0.6},
    {"top_p": 0.8, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.8, "min_p": 0.15},
]


def normalized(logits: torch.Tensor, *rows: SamplingParams) -> torch.Tensor:
    """probabilities of [B, V] logits."""
    return probabilities(logits[:, None], Params.stack(rows, torch.zeros(len(rows))))[:, 0]


def warped(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """The same by transformers, in its order."""
    for name, warper in WARPERS.items():
        logits = warper(options[name])(None, logits) if name in options else logits
    return torch.softmax(logits, dim=-1)


@pytest.mark.parametrize(
    "options",
    OPTIONS,
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("V", [1, 5, 60, 3000])
def test_equals_transformers_warpers(V: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits = 3 * torch.randn(30, V, generator=torch.Generator().manual_seed(V), dtype=dtype)
    p = normalized(logits, *[SamplingParams(**options)] * 30)
    expected = warped(logits, options)
    assert p.dtype == dtype
    differ = (p > 0) != (expected > 0)
    if (
        dtype == torch.float32
    ):  # sums from either end round differently: the last token inside may be the first outside
        assert (
            int(differ.sum(-1).max()) <= 1
            and float(torch.maximum(p, expected)[differ].sum()) < 1e-4
        )
    else:
        assert not bool(differ.any())
    assert torch.allclose(p, expected, atol=1e-5 if dtype == torch.float32 else 1e-6)
    assert torch.allclose(p.sum(-1), torch.ones(30, dtype=dtype), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_in_float32(dtype: torch.dtype) -> None:
    logits = torch.linspace(-4, 4, 60)[
        torch.randperm(60, generator=torch.Generator().manual_seed(0))
    ][None].to(dtype)
    for options in OPTIONS:
        p = normalized(logits, SamplingParams(**options))
        assert p.dtype == torch.float32
        assert torch.equal(p, normalized(logits.float(), SamplingParams(**options)))


def test_one_row_each_in_one_batch() -> None:
    logits = 3 * torch.randn(
        len(OPTIONS), 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    p = normalized(logits, *[SamplingParams(**options) for options in OPTIONS])
    for row, options in enumerate(OPTIONS):
        alone = normalized(logits[row : row + 1], SamplingParams(**options))[0]
        assert torch.equal(p[row], alone)


@pytest.mark.parametrize("other", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}], ids=str)
def test_a_row_does_not_feel_its_neighbours_at_all(other: dict[str, Any]) -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    rows = [SamplingParams()] * 64
    assert torch.equal(
        normalized(logits, *rows),
        normalized(torch.cat([logits, logits[:1]]), *rows, SamplingParams(**other))[:64],
    )


def test_positions_of_a_row_share_its_parameters() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [SamplingParams(top_k=2), SamplingParams(top_p=0.5, temperature=0.3)]
    p = probabilities(logits, Params.stack(rows, torch.zeros(2)))
    for k in range(3):
        assert torch.equal(p[:, k], normalized(logits[:, k], *rows))


def test_greedy_is_one_hot_at_the_first_of_the_best() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 3.0]])
    p = normalized(
        logits,
        SamplingParams(temperature=0, top_k=2, top_p=0.5, min_p=0.5),
        SamplingParams(temperature=0),
    )
    assert p.tolist() == [[0, 1, 0], [1, 0, 0]]
    soft = normalized(
        logits, SamplingParams(temperature=0), SamplingParams()
    )  # next to a row that is not greedy
    assert soft[0].tolist() == [0, 1, 0] and float(soft[1].max()) < 0.5


def test_forbidden_tokens_stay_forbidden() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    for options in OPTIONS:
        p = normalized(logits, SamplingParams(**options))
        assert bool(p.isfinite().all()) and p[0, [1, 3]].tolist() == [0, 0]


# ---- ties ----


def test_top_k_keeps_every_token_as_likely_as_the_kth() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 1.0, 1.0, -1.0]])
    for k, count in [(1, 1), (2, 4), (3, 4), (4, 4), (5, 5), (6, 6)]:
        p = normalized(logits, SamplingParams(top_k=k))
        assert int((p > 0).sum()) == count
        assert torch.equal(p > 0, warped(logits, {"top_k": k}) > 0)


def test_min_p_keeps_what_is_exactly_on_its_edge() -> None:
    logits = torch.tensor([[4.0, 2.0, 2.0, 1.0]], dtype=torch.float64).log()
    p = normalized(logits, SamplingParams(min_p=0.5))
    assert p[0].tolist() == pytest.approx([0.5, 0.25, 0.25, 0])
    assert torch.equal(p > 0, warped(logits, {"min_p": 0.5}) > 0)


def test_top_p_stops_where_the_mass_is_exactly_reached() -> None:
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]], dtype=torch.float64).log()
    for top_p, count in [(0.5, 1), (0.75, 2), (0.76, 4)]:
        p = normalized(logits, SamplingParams(top_p=top_p))
        assert int((p > 0).sum()) == count
    assert torch.equal(
        normalized(logits, SamplingParams(top_p=0.5)) > 0, warped(logits, {"top_p": 0.5}) > 0
    )


def flat_with_a_peak(V: int, at: int) -> torch.Tensor:
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, at] = 2
    return logits


def smallest_set(p: np.ndarray, top_p: float) -> list[int]:
    """The most likely tokens until the mass is reached, with all that equal the last of them."""
    best = np.sort(p)[::-1]
    needed = max(1, int((np.cumsum(best) - best < np.float64(np.float32(top_p))).sum()))
    return np.flatnonzero(p >= best[needed - 1]).tolist()


@pytest.mark.parametrize("V", [4, 7, 20, 100, 600])
@pytest.mark.parametrize("top_p", [0.1, 0.7])
def test_top_p_keeps_what_transformers_keeps_and_its_equals(top_p: float, V: int) -> None:
    """Which of several equals transformers keeps depends on its sort; here all stay or all go."""
    logits = flat_with_a_peak(V, 2)
    ours = normalized(logits, SamplingParams(top_p=top_p))[0] > 0
    theirs = warped(logits, {"top_p": top_p})[0] > 0
    assert ours.nonzero()[:, 0].tolist() == smallest_set(
        torch.softmax(logits, -1)[0].numpy(), top_p
    )
    assert torch.equal(ours, logits[0] >= logits[0][theirs].min())


@pytest.mark.parametrize("sharpness", [0.0, 1e-3, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.7, 0.95])
def test_top_p_is_exact_past_the_prefix(top_p: float, sharpness: float) -> None:
    """Flat distributions over 2000 tokens: the set is larger than the first candidates."""
    logits = sharpness * torch.randn(
        4, 2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    result = normalized(logits, *[SamplingParams(top_p=top_p)] * 4)
    p = torch.softmax(logits, -1).numpy()
    sizes = set()
    for row in range(4):
        expected = smallest_set(p[row], top_p)
        assert result[row].nonzero()[:, 0].tolist() == expected
        sizes.add(len(expected))
    if 0 < sharpness <= 0.1 and top_p > 0.5:
        assert min(sizes) > PREFIX and max(sizes) < 2000


def test_a_flat_row_beside_a_peaked_one() -> None:
    logits = torch.stack(
        [torch.zeros(2000, dtype=torch.float64), 5 * torch.randn(2000, dtype=torch.float64)]
    )
    rows = [SamplingParams(top_p=0.7)] * 2
    result = normalized(logits, *rows)
    assert result[0].nonzero()[:, 0].tolist() == list(range(2000))  # equals stay together
    assert torch.equal(result[1], normalized(logits[1:], rows[1])[0])


# ---- temperatures at the edge of float32 ----


@pytest.mark.parametrize(
    "temperature",
    [
        1e-3,
        1e-10,
        1e-38,  # logits / temperature would overflow
        1e-46,  # 0 in float32
    ],
)
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    result = normalized(torch.tensor([[0.0, 10.0, 20.0]]), SamplingParams(temperature=temperature))
    assert result.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("temperature", [1e-40, 5e-39, 1e-46])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_without_a_normal_float32_is_greedy(
    temperature: float, dtype: torch.dtype
) -> None:
    """Ties and all, and also where subnormal numbers are flushed to zero."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 40, generator=generator, dtype=dtype)
    logits[0, 0, :4] = 9.0
    rows = [SamplingParams(temperature=t, top_k=7, top_p=0.9) for t in (temperature, 0.0)]
    cold, greedy = (Params.stack([row] * 5, torch.full((5,), 9)) for row in rows)
    assert torch.equal(probabilities(logits, cold), probabilities(logits, greedy))
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(probabilities(logits, cold), probabilities(logits, greedy))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("top_p", [1e-6, 1e-46])  # the second is 0 in float32
def test_a_tiny_top_p_keeps_the_best(top_p: float) -> None:
    assert normalized(torch.tensor([[0.0, 1.0, 2.0]]), SamplingParams(top_p=top_p)).tolist() == [
        [0, 0, 1]
    ]


# ---- the draw ----


def test_the_draw_is_the_inverse_of_the_cumulative_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    for V in (1, 2, 7, 5000):
        weights = torch.rand(200, V, generator=generator, dtype=torch.float64) ** 4
        u = torch.rand(200, generator=generator, dtype=torch.float64)
        cdf = np.cumsum(weights.numpy(), axis=-1)
        expected = [
            int(np.searchsorted(row, x * row[-1], side="right"))
            for row, x in zip(cdf, u.numpy(), strict=True)
        ]
        assert draw(weights, u).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_of_zero_is_never_drawn(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0.0, 5e-324, 2.0**-53, 0.5, 1 - 2.0**-52, ALMOST_ONE], dtype=torch.float64)
    for V in (2, 3, 8, 1000):
        weights = torch.rand(3000, V, generator=generator, dtype=dtype) ** 8
        hole = torch.rand(3000, V, generator=generator) < torch.rand(3000, 1, generator=generator)
        hole[:, 0] |= torch.arange(3000) % 2 == 0  # the ends are where rounding would let one slip
        hole[:, -1] |= torch.arange(3000) % 3 == 0
        weights[hole] = 0
        weights = weights[weights.sum(-1) > 0]
        for scale in (1.0, 1e-30, 1e6):
            scaled = weights * scale
            scaled = scaled[scaled.double().sum(-1) > 0]
            result = draw(scaled[:, None].expand(-1, len(ends), -1), ends.expand(len(scaled), -1))
            assert bool((scaled.gather(1, result) > 0).all())


def test_a_total_so_small_that_rounding_lifts_the_uniform_onto_it() -> None:
    weights = torch.tensor([[5e-324, 0.0], [0.0, 5e-324]], dtype=torch.float64)
    assert draw(weights, torch.full((2,), ALMOST_ONE, dtype=torch.float64)).tolist() == [0, 1]


def test_the_ends_of_the_unit_interval_are_the_first_and_the_last_token() -> None:
    weights = torch.tensor(
        [[0.0, 0.25, 0.0, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]]
    )
    assert draw(weights, torch.zeros(3)).tolist() == [1, 0, 4]
    assert draw(weights, torch.full((3,), ALMOST_ONE, dtype=torch.float64)).tolist() == [3, 0, 4]
    assert draw(weights[:1], torch.tensor([0.25], dtype=torch.float64)).tolist() == [
        3
    ]  # u is in [0, 1): 0.25 is the next token's
    assert draw(weights[:1], torch.tensor([np.nextafter(0.25, 0)])).tolist() == [1]


def test_the_cumulative_sum_is_float64() -> None:
    """100 000 float32 weights: summed in float32 the last tokens would be off by many places."""
    weights = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(0, ALMOST_ONE, 51, dtype=torch.float64)
    cdf = np.cumsum(weights[0].double().numpy())
    expected = np.searchsorted(
        cdf, np.minimum(u.numpy() * cdf[-1], np.nextafter(cdf[-1], 0)), side="right"
    )
    assert draw(weights.expand(51, -1), u).tolist() == expected.tolist()
    single = torch.searchsorted(
        weights[0].cumsum(0), (u * weights[0].cumsum(0)[-1]).float(), right=True
    )
    assert single.tolist() != expected.tolist()  # so the line above could fail


def test_weights_need_not_be_normalised() -> None:
    weights = torch.tensor([[1.0, 3.0], [10.0, 30.0], [1e-12, 3e-12]], dtype=torch.float64)
    for u in (0.0, 0.2499, 0.2501, 0.9):
        assert len(set(draw(weights, torch.full((3,), u, dtype=torch.float64)).tolist())) == 1


def test_leading_shapes() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0]).expand(2, 4, 3)
    assert draw(weights, torch.rand(2, 4, dtype=torch.float64)).tolist() == [[1] * 4] * 2


def test_draws_have_the_law_of_the_weights() -> None:
    weights = torch.tensor([0.1, 0.0, 0.2, 0.65, 0.05], dtype=torch.float64)
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(draw(weights.expand(100_000, 5), u), minlength=5)
    assert counts[1] == 0
    assert (
        stats.chisquare(counts[[0, 2, 3, 4]], (weights[[0, 2, 3, 4]] * 100_000).numpy()).pvalue
        > 1e-3
    )
