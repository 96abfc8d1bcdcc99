"""Reading a study: intervals whose truth is known, rank correlations worked out by hand, and a study of four trials."""

import json

import numpy as np
import pytest

from helpers.evaluation.measures import Z95
from helpers.studies.effects import Findings, crossed_bootstrap, rank_correlation, ranks_of
from helpers.studies.questions import CENTRE

# --- the interval ---------------------------------------------------------------------------------------------------


def crossed(seeds, prompts, sigmas, number):
    """A table of seed effect + prompt effect + noise, with mean 0."""
    rng = np.random.default_rng(number)
    rows, columns = rng.normal(0, sigmas[0], (seeds, 1)), rng.normal(0, sigmas[1], (1, prompts))
    return rows + columns + rng.normal(0, sigmas[2], (seeds, prompts))


def coverage(seeds, prompts, sigmas, times=250):
    """Share of the intervals that hold the true mean, which is 0."""
    tables = (crossed(seeds, prompts, sigmas, number) for number in range(times))
    found = [crossed_bootstrap(table, number, 400) for number, table in enumerate(tables)]
    return np.mean([measure.low <= 0 <= measure.high for measure in found])


def test_a_constant_table_has_no_width():
    assert crossed_bootstrap(np.full((3, 7), 0.25)).interval == pytest.approx((0.25, 0.25), abs=1e-12)
    measure = crossed_bootstrap([[0.5]])
    assert measure.value == 0.5 and measure.interval == (0.5, 0.5) and measure.n == 1


def test_the_mean_and_the_count_are_the_table_s():
    table = crossed(3, 8, (1, 1, 1), 0)
    measure = crossed_bootstrap(table)
    assert measure.value == pytest.approx(table.mean()) and measure.n == 24
    assert measure.low < measure.value < measure.high
    assert measure == crossed_bootstrap(table) and measure != crossed_bootstrap(table, seed=1)


def test_one_seed_leaves_the_prompts_bootstrap():
    x = np.random.default_rng(0).normal(2, 1, (1, 300))
    half = Z95 * x.std() / np.sqrt(300)
    assert crossed_bootstrap(x).interval == pytest.approx((x.mean() - half, x.mean() + half), abs=0.02)
    assert crossed_bootstrap(x.T).interval == pytest.approx((x.mean() - half, x.mean() + half), abs=0.02)


def test_a_resample_is_whole_seeds_and_whole_prompts():
    """With two seeds the means are a, (a + b) / 2 or b, where nothing differs between prompts; a and b move apart."""
    table = np.array([[0.0] * 5, [1.0] * 5])
    assert crossed_bootstrap(table).interval == pytest.approx((0.5 - 0.5**0.5, 0.5 + 0.5**0.5))
    assert crossed_bootstrap(table.T).interval == pytest.approx((0.0, 1.0))


def test_the_interval_of_many_seeds_holds_the_truth_as_often_as_it_says():
    assert 0.90 <= coverage(30, 40, (1, 1, 1)) <= 0.99


def test_an_interval_over_values_alone_would_be_too_narrow():
    """What the crossing is for: all values drawn as if independent miss the truth most of the time."""
    held = []
    for number in range(250):
        table = crossed(30, 40, (1, 1, 1), number)
        held.append(abs(table.mean()) <= Z95 * table.std() / np.sqrt(table.size))
    assert np.mean(held) < 0.5


def test_few_seeds_hold_the_truth_less_often_and_prompts_do_not():
    """Three seeds have ten resamples: widening mends the variance, not how little three values can say."""
    assert 0.75 < coverage(3, 40, (1, 0, 0)) < 0.93, "three seeds, and all variance is theirs"
    assert coverage(3, 40, (0, 1, 0.1)) > 0.88, "three seeds, and it is the prompts'"


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_resampled_means_have_the_variance_of_a_mean_over_so_many_seeds(seeds):
    """Plain resampling gives (S - 1) / S times the unbiased estimate; here S / (S - 1) undoes it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=seeds)
    chosen = rng.integers(0, seeds, (200_000, seeds))
    plain = x[chosen].mean(1)
    unbiased = x.var(ddof=1) / seeds
    assert plain.var() == pytest.approx(unbiased * (seeds - 1) / seeds, rel=0.02)
    widened = x.mean() + np.sqrt(seeds / (seeds - 1)) * (plain - x.mean())
    assert widened.var() == pytest.approx(unbiased, rel=0.02)
    ends = np.quantile(widened, (0.025, 0.975))
    assert crossed_bootstrap(np.outer(x, np.ones(3)), draws=20_000).interval == pytest.approx(tuple(ends), abs=0.05)


@pytest.mark.parametrize("values", [[], [[]], [1.0, 2.0], [[1.0, np.nan]], [[np.inf]], np.zeros((2, 2, 2))])
def test_a_table_that_is_not_full_is_refused(values):
    with pytest.raises(ValueError, match="should be a full table"):
        crossed_bootstrap(values)


# --- rank correlation -----------------------------------------------------------------------------------------------


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks_of([30, 10, 20]).tolist() == [3, 1, 2]
    assert ranks_of([1, 1, 0, 1]).tolist() == [3, 3, 1, 3]
    assert ranks_of([2, 2]).tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([1, 2, 3, 4], [10, 100, 1000, 1001], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        # without ties 1 - 6 sum d^2 / (n (n^2 - 1)): d = (0, 1, -1, 0), and the textbook's IQ and hours of television
        ([1, 2, 3, 4], [1, 3, 2, 4], 1 - 6 * 2 / 60),
        ([106, 100, 86, 101, 99, 103, 97, 113, 112, 110], [7, 27, 2, 50, 28, 29, 20, 12, 6, 17], -29 / 165),
        # ranks (1.5, 1.5, 3) and (1, 2, 3): covariance 1.5, variances 1.5 and 2
        ([1, 1, 2], [1, 2, 3], 1.5 / np.sqrt(1.5 * 2)),
    ],
)
def test_rank_correlation_against_values_by_hand(a, b, expected):
    assert rank_correlation(a, b) == pytest.approx(expected)
    assert rank_correlation(b, a) == pytest.approx(expected)


def test_rank_correlation_refuses_what_has_no_order():
    for a, b in ([1, 2], [1, 2, 3]), ([1], [1]), ([], []):
        with pytest.raises(ValueError, match="two lists of one length"):
            rank_correlation(a, b)
    with pytest.raises(ValueError, match="no order to compare"):
        rank_correlation([1, 2, 3], [5, 5, 5])


# --- a study of two points, a control, and two seeds ------------------------------------------------------------------

PROMPTS = 6
POINTS = {CENTRE: {}, "rank=4": {"rank": 4}, "rank=64": {"rank": 64}, "control=base": {"control": "base"}}


def measures(values, train, held_out, copies):
    return {
        "style.world": list(values),
        "loss.train": [train] * 4,
        "loss.held_out": [held_out] * 4,
        "loss_by_timestep.train": [train] * 8,
        "loss_by_timestep.held_out": [held_out + 0.1 * t for t in range(8)],
        "copies.world": copies,
        "copies.imagenet": [0, 6],
        "nearest.world": {"chosen": [0, 1, 2, 3, 4, 5], "pool": 20},
        "nearest.imagenet": {"chosen": [19] * 6, "pool": 20},
    }


def table():
    """Style of the centre [2 seeds, prompts]."""
    return np.random.default_rng(0).uniform(0.2, 0.6, (2, PROMPTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    trials = []
    for seed, row in enumerate(table()):
        for point, shift in ((CENTRE, 0.0), ("rank=4", 0.25), ("rank=64", -0.125 * seed)):
            early = measures(row - 0.2, 0.3, 0.31, [3, 6])
            late = measures(row + shift, 0.2 + 0.01 * seed, 0.3, [5 - seed, 6])
            trials.append({"point": point, "seed": seed, "measures": {"2": early, "4": late}})
    base = measures(np.full(PROMPTS, 0.1), 0.4, 0.4, [3, 6])
    trials.append({"point": "control=base", "seed": 0, "measures": {"4": base}})
    folder = tmp_path_factory.mktemp("studies")
    about = {"study": "small", "measured_at": [2, 4], "points": POINTS, "trials": trials}
    (folder / "small.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


@pytest.fixture
def findings(folder):
    return Findings.load("small", folder)


def test_a_study_that_is_not_there_names_its_command(folder):
    with pytest.raises(ValueError, match="no study 'large' yet; `course sweep --study large` runs it"):
        Findings.load("large", folder)


def test_what_a_study_has(findings):
    assert findings.steps == 4 and findings.points == [CENTRE, "rank=4", "rank=64"]
    assert findings.of_factor("rank") == ["rank=4", "rank=64"] and findings.of_factor("ran") == []
    assert findings.seeds(CENTRE) == [0, 1] and findings.seeds("control=base") == [0]
    assert "trials" not in findings.about and len(findings.trials) == 7
    with pytest.raises(ValueError, match="no point 'rank=5'; it has centre, rank=4"):
        findings.seeds("rank=5")


def test_values_are_seeds_by_prompts(findings):
    assert np.array_equal(findings.values(CENTRE, "style.world"), table())
    assert np.allclose(findings.values(CENTRE, "style.world", 2), table() - 0.2)
    assert findings.values("control=base", "style.world").shape == (1, PROMPTS)


def test_the_mean_has_the_crossed_interval(findings):
    assert findings.mean(CENTRE, "style.world") == crossed_bootstrap(table())
    assert findings.mean(CENTRE, "style.world", 2).value == pytest.approx(table().mean() - 0.2)


def test_a_constant_difference_has_no_width(findings):
    effect = findings.effect("rank=4", "style.world")
    assert effect.value == pytest.approx(0.25) and effect.interval == pytest.approx((0.25, 0.25), abs=1e-12)
    assert findings.mean(CENTRE, "style.world").high - findings.mean(CENTRE, "style.world").low > 0.05
    back = findings.effect(CENTRE, "style.world", "rank=4")
    assert back.interval == pytest.approx((-0.25, -0.25), abs=1e-12)


def test_a_difference_between_seeds_is_seen(findings):
    effect = findings.effect("rank=64", "style.world")
    assert effect.value == pytest.approx(-0.0625)
    assert effect.interval == pytest.approx((-0.0625 * (1 + 2**0.5), 0.0625 * (2**0.5 - 1)))


def test_the_base_stands_beside_each_seed(findings):
    effect = findings.effect(CENTRE, "style.world", "control=base")
    assert effect == crossed_bootstrap(table() - 0.1) and effect.n == 2 * PROMPTS
    assert findings.effect("control=base", "style.world").value == pytest.approx(0.1 - table().mean())


def test_the_base_s_own_difference_is_as_wide_the_other_way_round(findings):
    there, back = (
        findings.effect(*pair) for pair in ((CENTRE, "style.world", "control=base"), ("control=base", "style.world"))
    )
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low), abs=2e-3)


def test_copies_add_up_over_the_seeds(findings):
    assert (findings.copies(CENTRE).value, findings.copies(CENTRE).n) == (9 / 12, 12)
    assert findings.copies(CENTRE, "imagenet").value == 0 and findings.copies(CENTRE, step=2).value == 0.5


def test_copies_are_beyond_chance_when_one_half_lies_outside_their_interval(findings):
    low, high = findings.chance(CENTRE)
    assert low == pytest.approx(1 - high) and 0 < low < 0.5
    copies = findings.copies(CENTRE)
    assert copies.low == pytest.approx(0.75 - (high - 0.5)) and copies.high == min(1, 0.75 + (0.5 - low))
    assert (copies.low > 0.5) == (0.75 > high)
    assert findings.chance(CENTRE, "imagenet") == (0, 1), "one picture is nearest to all: half of the time it trained"


def test_the_gap_is_held_out_minus_training_loss(findings):
    gap = findings.gap(CENTRE)
    assert gap.value == pytest.approx(0.3 - 0.205) and gap.n == 16
    # the held-out loss has no width; the training loss is 0.20 with one seed and 0.21 with the other
    assert gap.interval == pytest.approx((0.095 - 0.005 * 2**0.5, 0.095 + 0.005 * 2**0.5))
    assert findings.gap(CENTRE, 2).interval == pytest.approx((0.01, 0.01))


def test_the_gap_s_widths_add_up_as_independent_ones(findings, monkeypatch):
    from helpers.studies import effects

    means = {"loss.held_out": effects.Measure(1.0, 0.7, 1.6, 5), "loss.train": effects.Measure(0.5, 0.2, 0.9, 5)}
    monkeypatch.setattr(Findings, "mean", lambda self, point, key, step=None: means[key])
    assert findings.gap(CENTRE).interval == pytest.approx((0.5 - np.hypot(0.3, 0.4), 0.5 + np.hypot(0.6, 0.3)))


def test_the_gap_by_timestep_is_the_mean_over_seeds(findings):
    expected = 0.3 - 0.205 + 0.1 * np.arange(8)
    assert findings.gap_by_timestep(CENTRE) == pytest.approx(expected)
