"""The uniforms: a pure function of their key, uniform, and independent wherever two keys differ."""

import itertools
from dataclasses import replace

import pytest
import torch
from scipy import stats

from specdiff.noise import GOLDEN, MIX1, MIX2, Noise, Purpose, _to_unit, row_seed
from specdiff.types import Batch, SamplingParams

ROWS = 20_000
MASK = (1 << 64) - 1


def noise(rows: int = ROWS, *, seed: int = 0, round_: int = 0, position: int = 1) -> Noise:
    """Rows with consecutive seeds, the hardest case a mixing function meets."""
    full = torch.full((rows,), 0)
    return Noise(torch.arange(rows) + seed, full + round_, full + position)


def mix(x: int) -> int:
    """splitmix64's output function on Python's integers."""
    x = (x + GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * MIX1) & MASK
    x = ((x ^ (x >> 27)) * MIX2) & MASK
    return x ^ (x >> 31)


def reference(seed: int, round_: int, position: int, purpose: Purpose, index: int) -> float:
    own = purpose is not Purpose.TARGET
    key = mix((mix(seed & MASK) + (int(purpose) << 32) + (index if own else 0)) & MASK)
    key = mix((key + round_) & MASK) if own else key
    return (mix((key + position) & MASK) >> 11) * 2.0**-53


def independent(one: torch.Tensor, two: torch.Tensor) -> float:
    """p of a chi-squared test on the 8 x 8 grid that two streams share."""
    cell = (one * 8).long() * 8 + (two * 8).long()
    return float(stats.chisquare(torch.bincount(cell.flatten(), minlength=64)).pvalue)


def test_equals_the_reference_on_pythons_integers() -> None:
    for seed, round_, position in itertools.product(
        [0, 1, -1, 1 << 62, -(1 << 63)], [0, 7, 1 << 40], [1, 1 << 33]
    ):
        one = Noise(torch.tensor([seed]), torch.tensor([round_]), torch.tensor([position]))
        for purpose, index in itertools.product(Purpose, [0, 3]):
            expected = [reference(seed, round_, position + k, purpose, index) for k in range(3)]
            assert one.uniform(purpose, 3, index)[0].tolist() == expected


def test_the_stream_is_frozen() -> None:
    """The text of a recorded seed: these numbers change only with a breaking release."""
    draws = noise(2, seed=42, round_=3, position=5).uniform(Purpose.DRAFT, 2)
    assert draws.tolist() == [
        [0.9753138672559424, 0.6141584047191595],
        [0.32730610440443353, 0.14175048354451258],
    ]


@pytest.mark.parametrize("purpose", Purpose)
def test_uniform_in_zero_one(purpose: Purpose) -> None:
    u = noise().uniform(purpose, 5)
    assert u.shape == (ROWS, 5) and u.dtype == torch.float64
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    low = (u * 2**53).long() & 0xFF  # the last of the 53 bits are as random as the first
    assert stats.chisquare(torch.bincount(low.flatten(), minlength=256)).pvalue > 1e-3


def test_the_largest_and_the_smallest_hash_stay_inside() -> None:
    ends = _to_unit(torch.tensor([0, -1, (1 << 63) - 1, -(1 << 63)]))
    assert ends.tolist() == [0, 1 - 2.0**-53, 0.5 - 2.0**-53, 0.5]


def test_no_draws_at_all() -> None:
    assert noise(3).uniform(Purpose.DRAFT, 0).shape == (3, 0)
    assert noise(3).shared(0, 4).shape == (3, 0, 4)


def test_different_keys_are_independent() -> None:
    streams = {}
    for purpose in Purpose:
        for index in range(1 if purpose is Purpose.TARGET else 3):
            streams[purpose.name, index] = noise().uniform(purpose, 1, index)
    streams |= {("round", r): noise(round_=r).uniform(Purpose.DRAFT, 1) for r in (1, 2)}
    streams |= {("position", k): noise(position=k).uniform(Purpose.DRAFT, 1) for k in (2, 3)}
    streams |= {("target at", k): noise(position=k).uniform(Purpose.TARGET, 1) for k in (2, 3)}
    streams |= {("seed", s): noise(seed=s).uniform(Purpose.DRAFT, 1) for s in (1 << 20, 1 << 40)}
    couples = list(itertools.combinations(streams, 2))
    for one, two in couples:
        assert not bool((streams[one] == streams[two]).any()), (one, two)
        assert independent(streams[one], streams[two]) > 1e-3 / len(couples), (one, two)


def test_neighbouring_rows_and_positions_are_independent() -> None:
    u = noise().uniform(Purpose.RATIO, 6)
    for shift in (1, 2, 3):
        assert independent(u[shift:], u[:-shift]) > 1e-4
        assert independent(u[:, shift:], u[:, :-shift]) > 1e-4
    assert independent(u[1:, :-1], u[:-1, 1:]) > 1e-4  # seed + 1 and position - 1 do not cancel


def test_round_and_position_do_not_stand_in_for_each_other() -> None:
    for purpose in (Purpose.DRAFT, Purpose.RATIO, Purpose.RESIDUAL):
        one = noise(round_=2, position=5).uniform(purpose, 1)
        two = noise(round_=1, position=6).uniform(purpose, 1)
        assert independent(one, two) > 1e-4 and not bool((one == two).any())
        assert not bool(
            (
                noise(seed=1, round_=1).uniform(purpose, 1) == noise(round_=2).uniform(purpose, 1)
            ).any()
        )


def test_the_independence_test_sees_dependence() -> None:
    u = noise().uniform(Purpose.DRAFT, 1)
    assert independent(u, u) < 1e-6
    assert independent(u, 1 - u) < 1e-6
    assert independent(u, (u + 0.2 * noise().uniform(Purpose.RATIO, 1)) % 1) < 1e-6


@pytest.mark.parametrize("purpose", Purpose)
def test_a_draw_belongs_to_its_absolute_position(purpose: Purpose) -> None:
    whole = noise(50, position=7).uniform(purpose, 6)
    for k in range(6):
        assert torch.equal(noise(50, position=7 + k).uniform(purpose, 6 - k), whole[:, k:])


def test_the_targets_draws_know_neither_round_nor_index() -> None:
    one = noise(50, round_=1)
    two = noise(50, round_=9)
    assert torch.equal(one.uniform(Purpose.TARGET, 4), two.uniform(Purpose.TARGET, 4, index=5))
    assert torch.equal(one.shared(4, 6), two.shared(4, 6))
    for purpose in (Purpose.DRAFT, Purpose.RATIO, Purpose.RESIDUAL):
        assert not bool((one.uniform(purpose, 4) == two.uniform(purpose, 4)).any())
        assert not bool((one.uniform(purpose, 4) == one.uniform(purpose, 4, index=5)).any())


def test_a_row_does_not_feel_its_neighbours() -> None:
    many = noise(100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    shuffled = Noise(many.seed[order], many.round, many.position)
    assert torch.equal(shuffled.uniform(Purpose.DRAFT, 4), many.uniform(Purpose.DRAFT, 4)[order])
    assert torch.equal(shuffled.shared(2, 5), many.shared(2, 5)[order])
    one = replace(many, seed=many.seed[7:8], round=many.round[7:8], position=many.position[7:8])
    assert torch.equal(one.uniform(Purpose.DRAFT, 4)[0], many.uniform(Purpose.DRAFT, 4)[7])


def test_shared_noise_is_gumbel_and_independent_across_tokens_and_positions() -> None:
    g = noise().shared(2, 3)
    assert g.shape == (ROWS, 2, 3) and bool(g.isfinite().all())
    assert stats.kstest(g.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    u = torch.exp(-torch.exp(-g)).flatten(1)
    for one, two in itertools.combinations(range(6), 2):
        assert independent(u[:, one], u[:, two]) > 1e-4
    assert torch.equal(noise(9, position=2).shared(1, 3), noise(9).shared(2, 3)[:, 1:])
    assert torch.equal(
        noise(9).shared(2, 5)[..., :3], noise(9).shared(2, 3)
    )  # keyed by token, not by vocabulary size


def test_noise_of_a_batch_starts_at_its_first_undecided_position() -> None:
    batch = Batch.of([[1, 2], [1, 2, 3]], [SamplingParams()] * 2, [5, 6])
    draws = Noise.of(replace(batch, round=torch.tensor([4, 0])))
    assert (draws.seed.tolist(), draws.round.tolist(), draws.position.tolist()) == (
        [5, 6],
        [4, 0],
        [2, 3],
    )


def test_row_seeds() -> None:
    roots = (0, 1, 2, 1 << 63, (1 << 64) - 1)
    seeds = [row_seed(root, row) for root, row in itertools.product(roots, range(1000))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s <= MASK for s in seeds)
    assert row_seed(0, 0) != 0 and row_seed(7, 0) == row_seed(7 + (1 << 64), 0)
    unit = [s / 2**64 for s in seeds]
    assert stats.kstest(unit, "uniform").pvalue > 1e-3
    assert [row_seed(42, row) for row in (0, 1)] == [8971393980013541938, 2347583489874693020]
    assert Batch.of([[1]] * 3, [SamplingParams()] * 3, [5, MASK, 1 << 63]).seed.tolist() == [
        5,
        -1,
        -(1 << 63),
    ]
