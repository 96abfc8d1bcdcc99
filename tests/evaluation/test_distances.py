"""Distances between sets of features: against loops, closed forms and simulations whose truth is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.evaluation.distances import (
    _kernel,
    _within,
    copy_share,
    diversity,
    diversity_ratio,
    fidelity,
    mmd,
    mmd_interval,
    nearest,
    shuffled_shares,
)
from helpers.evaluation.measures import bootstrap, wilson


def normal(n, width, seed, shift=0.0, spread=1.0):
    """n rows from a Gaussian of this spread, its mean `shift` along the first axis."""
    x = spread * torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] += shift
    return x


def true_mmd(width, shift, spread_x, spread_y, sigma):
    """1000 MMD^2 of two round Gaussians. For z ~ N(m, v I), E exp(-|z|^2 / 2 s^2) is a Gaussian integral in m and v."""

    def mean_kernel(variance, gap):
        return (sigma**2 / (sigma**2 + variance)) ** (width / 2) * math.exp(-(gap**2) / (2 * (sigma**2 + variance)))

    within = mean_kernel(2 * spread_x**2, 0) + mean_kernel(2 * spread_y**2, 0)
    return 1000 * (within - 2 * mean_kernel(spread_x**2 + spread_y**2, shift))


# --- MMD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [10.0, 0.7])
def test_mmd_against_loops(sigma):
    x, y = normal(5, 3, 0).numpy(), normal(7, 3, 1, 0.5).numpy()

    def k(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * sigma**2))

    total = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (5 * 4)
    total += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (7 * 6)
    total -= 2 * sum(k(a, b) for a in x for b in y) / (5 * 7)
    assert mmd(torch.tensor(x), torch.tensor(y), sigma) == pytest.approx(1000 * total, rel=1e-9)
    if sigma == 10.0:
        assert mmd(torch.tensor(x), torch.tensor(y)) == pytest.approx(1000 * total, rel=1e-9)


@pytest.mark.parametrize(("shift", "spread_y", "sigma"), [(0.0, 1.0, 1.0), (0.8, 1.3, 1.0), (1.0, 1.0, 10.0)])
def test_mmd_is_right_on_average(shift, spread_y, sigma):
    found = [mmd(normal(12, 3, k), normal(9, 3, 10_000 + k, shift, spread_y), sigma) for k in range(600)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - true_mmd(3, shift, 1.0, spread_y, sigma)) < 3.5 * error
    # the biased estimator is off by 1/12 + 1/9 of the self-similarity that a pair lacks, far more than the error
    biased = (1 - true_self_similarity(3, 1.0, sigma)) / 12 + (1 - true_self_similarity(3, spread_y, sigma)) / 9
    assert 1000 * biased > 6 * error


def true_self_similarity(width, spread, sigma):
    return (sigma**2 / (sigma**2 + 2 * spread**2)) ** (width / 2)


def test_mmd_keeps_small_distances_of_unit_float32_features():
    x, y = (F.normalize(normal(60, 768, k, shift), dim=1) for k, shift in ((0, 0.0), (1, 3.0)))
    assert mmd(x.float(), y.float()) == pytest.approx(mmd(x, y), abs=1e-5)
    assert mmd(x, y) == pytest.approx(mmd(y, x), abs=1e-9) and mmd(x, x[:30]) < 0 < mmd(x, y)


def test_mmd_refuses_what_it_cannot_compare():
    x = normal(4, 3, 0)
    for bad, message in (
        (x[:1], "at least 2 rows"),
        (x[0], "at least 2 rows"),
        (x[:, :2], "encoded alike"),
        (x / 0, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            mmd(x, bad)
        with pytest.raises(ValueError, match=message):
            mmd_interval(bad, x, 0, 10)
    with pytest.raises(ValueError, match="sigma"):
        mmd(x, x, 0.0)


# --- its interval -----------------------------------------------------------------------------------------------------


def test_copies_of_one_picture_are_no_pair():
    x = normal(6, 2, 3)
    rows = torch.tensor([0, 0, 2, 5, 5, 5])
    k = _kernel(x, x, 1.0)
    pairs = [k[i, j].item() for i in rows for j in rows if i != j]
    counts = torch.bincount(rows, minlength=6).double()[None]
    assert _within(k, counts).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert len(pairs) == 36 - (4 + 1 + 9)


@pytest.mark.parametrize(
    ("width", "n", "m", "shift", "spread", "sigma", "least", "most"),
    [
        (2, 60, 60, 1.0, 1.0, 1.0, 0.90, 0.985),  # clearly different
        (2, 40, 80, 1.0, 1.3, 1.0, 0.90, 0.985),  # sets of unequal size and spread
        (20, 60, 60, 0.3, 0.2, 10.0, 0.90, 0.99),  # features of length about 1, as CMMD's
        (20, 60, 60, 0.0, 0.2, 10.0, 0.97, 1.0),  # the same distribution: wider than need be
    ],
)
def test_coverage_of_the_interval(width, n, m, shift, spread, sigma, least, most):
    truth = true_mmd(width, shift, spread, spread, sigma)
    found = []
    for k in range(200):
        x, y = normal(n, width, 2 * k, 0.0, spread), normal(m, width, 2 * k + 1, shift, spread)
        interval = mmd_interval(x, y, k, 300, sigma)
        found.append(interval.low <= truth <= interval.high)
    assert least <= np.mean(found) <= most


def test_interval_is_reproducible_and_about_the_estimate():
    x, y = normal(50, 4, 0), normal(30, 4, 1, 1.0)
    one, again, other = (mmd_interval(x, y, seed, 400) for seed in (1, 1, 2))
    assert one == again and one.interval != other.interval
    assert one.n == 50 and one.value == other.value == mmd(x, y)
    assert one.low < one.value < one.high
    assert mmd_interval(x, y, 1, 400, sigma=1.0).value == mmd(x, y, 1.0)
    few = mmd_interval(x[:2], y[:2], 0, 200)  # half the resamples of two pictures hold but one
    assert math.isfinite(few.low) and few.low <= few.high


# --- variety ----------------------------------------------------------------------------------------------------------


def test_diversity_against_loops_whatever_the_lengths():
    groups = [normal(k, 5, k) for k in (2, 3, 7)]
    spreads = []
    for group in groups:
        pairs = [(a, b) for i, a in enumerate(group) for b in group[i + 1 :]]
        spreads.append(np.mean([1 - F.cosine_similarity(a, b, dim=0).item() for a, b in pairs]))
    assert diversity(groups, 4, 500).interval == pytest.approx(bootstrap(spreads, 4, 500).interval)
    assert diversity(groups).value == pytest.approx(np.mean(spreads))
    assert diversity([3 * group for group in groups]).value == pytest.approx(np.mean(spreads))
    assert diversity(groups).n == 3


def test_diversity_of_known_groups():
    same, square, opposite = torch.ones(4, 3), torch.eye(3), torch.tensor([[1.0, 0], [-1, 0]])
    for group, expected in ((same, 0.0), (square, 1.0), (opposite, 2.0)):
        assert diversity([group, group]).interval == pytest.approx((expected, expected), abs=1e-12)
    with pytest.raises(ValueError, match="at least 2 rows"):
        diversity([square, square[:1]])
    with pytest.raises(ValueError, match="all zeros"):
        diversity([torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="no values"):
        diversity([])


# --- nearness ---------------------------------------------------------------------------------------------------------


def test_nearest_against_loops_whatever_the_lengths():
    x, references = normal(9, 4, 0), normal(13, 4, 1) * torch.linspace(0.1, 9, 13)[:, None]
    indices, cosines = nearest(x.float(), references.float())
    for row, index, cosine in zip(x, indices, cosines, strict=True):
        every = [F.cosine_similarity(row, reference, dim=0).item() for reference in references]
        assert index == int(np.argmax(every)) and cosine.item() == pytest.approx(max(every), abs=1e-6)
    assert indices.dtype == torch.int64
    with pytest.raises(ValueError, match="references should be"):
        nearest(x, references[:0])
    with pytest.raises(ValueError, match="features a row"):
        nearest(x, references[:, :2])


def test_copies_are_found():
    train, held_out = normal(30, 16, 0), normal(30, 16, 1)
    copies = train[:20] + normal(20, 16, 2, spread=0.05)
    assert copy_share(copies, train, held_out) == wilson(20, 20)
    assert copy_share(copies, held_out, train) == wilson(0, 20)


@pytest.mark.parametrize(("train", "held_out"), [(400, 20), (20, 400)])
def test_a_model_that_copies_nothing_is_at_one_half_whatever_the_set_sizes(train, held_out):
    shares = [
        copy_share(normal(40, 8, 3 * k), normal(train, 8, 3 * k + 1), normal(held_out, 8, 3 * k + 2), seed=k).value
        for k in range(60)
    ]
    assert abs(np.mean(shares) - 0.5) < 4 * np.std(shares) / math.sqrt(60) < 0.1


def test_the_part_of_the_training_pictures_is_the_seed_s():
    x, train, held_out = normal(50, 8, 0), normal(500, 8, 1), normal(25, 8, 2)
    assert copy_share(x, train, held_out) == copy_share(x, train, held_out)
    assert len({copy_share(x, train, held_out, seed).value for seed in range(8)}) > 1


def test_ties_count_half():
    # rows 0 and 1 are in both sets, up to rounding; row 2 is a training picture's, row 4 a held-out one's
    train, held_out = torch.eye(6)[:3], torch.eye(6)[[0, 1, 4]]
    held_out[:2, 5] = 1e-4  # cosine 1 - 5e-9
    assert copy_share(torch.eye(6)[:2], train, held_out) == wilson(1, 2)
    assert copy_share(torch.eye(6)[[0, 1, 2]], train, held_out) == wilson(2, 3)
    assert copy_share(torch.eye(6)[[0, 4, 2]], train, held_out) == wilson(1, 3)  # an odd tie, against copying
    with pytest.raises(ValueError, match="at least 1 rows"):
        copy_share(torch.eye(6)[:0], train, held_out)
    with pytest.raises(ValueError, match="at least 1 rows"):
        copy_share(train, train, held_out[:0])


# --- fidelity ---------------------------------------------------------------------------------------------------------


def test_fidelity_is_the_ratio_of_two_distances_without_the_pairs_of_a_prompt():
    content = normal(300, 4, 0)  # what a prompt fixes: the same in all three sets

    def pictures(seed, shift):
        return content + normal(300, 4, seed, shift, 0.3)

    drawn, ceiling = pictures(1, 0.0), pictures(2, 0.5)
    near, far = (fidelity(pictures(seed, shift), drawn, ceiling).value for seed, shift in ((3, 0.5), (4, 1.0)))
    assert 0.8 < near < 1.25  # as far as the ceiling
    assert 3.2 < far < 4.8  # twice the shift is four times the squared distance


def test_fidelity_counts_no_pair_of_one_prompt():
    x, y, z = (normal(4, 3, seed, seed) for seed in range(3))

    def distance(a, b):
        k = [_kernel(p, q, 10.0) for p, q in ((a, a), (b, b), (a, b))]
        means = [sum(m[i, j] for i in range(4) for j in range(4) if i != j) / 12 for m in k]
        return means[0] + means[1] - 2 * means[2]

    assert fidelity(x, y, z).value == pytest.approx((distance(x, y) / distance(z, y)).item())


def test_fidelity_refuses_sets_that_do_not_match_and_a_perfect_ceiling():
    x = normal(20, 3, 0)
    with pytest.raises(ValueError, match="one row a prompt"):
        fidelity(x[:10], x, x)
    with pytest.raises(ValueError, match="take more pictures"):
        fidelity(normal(20, 3, 1), x, x)


def test_diversity_ratio_compares_spreads_prompt_by_prompt():
    centre = torch.tensor([10.0, 0, 0, 0], dtype=torch.float64)
    others = [centre + normal(40, 4, k) for k in range(6)]
    groups = [centre + normal(40, 4, k, spread=0.5) for k in range(6)]
    ratio = diversity_ratio(groups, others)
    assert ratio.low <= ratio.value <= ratio.high and ratio.n == 6
    assert ratio.value == pytest.approx(0.25, rel=0.1)  # half the spread is a quarter of the squared angle
    assert diversity_ratio(others, others).value == pytest.approx(1)
    with pytest.raises(ValueError, match="as many groups"):
        diversity_ratio(groups, others[:2])


# --- what chance gives -----------------------------------------------------------------------------------------------


def test_shuffled_shares_lie_around_one_half_and_are_wider_where_one_picture_is_nearest_to_many():
    spread = shuffled_shares(list(range(40)), 200)
    assert spread.mean() == pytest.approx(0.5, abs=0.01)
    # a hypergeometric share: sqrt(1/4 / n * (N - n) / (N - 1))
    assert spread.std() == pytest.approx(np.sqrt(0.25 / 40 * 160 / 199), rel=0.05)
    clumped = shuffled_shares([0] * 20 + [1] * 20, 200)
    assert set(np.unique(clumped)) == {0.0, 0.5, 1.0} and clumped.std() > 3 * spread.std()
    assert np.array_equal(spread, shuffled_shares(list(range(40)), 200))


def test_nothing_copied_lies_within_the_shuffled_shares_as_often_as_it_should():
    g, inside = torch.Generator().manual_seed(0), []
    for seed in range(200):
        x, pool = (torch.randn(n, 3, generator=g) for n in (64, 32))
        chosen = nearest(x, pool)[0]
        low, high = np.quantile(shuffled_shares(chosen.tolist(), 32, seed, 400), (0.025, 0.975))
        inside.append(low <= (chosen < 16).double().mean().item() <= high)
    assert np.mean(inside) >= 0.93
