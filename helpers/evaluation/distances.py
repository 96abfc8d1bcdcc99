"""Comparing sets of pictures by their features: how far apart, how varied, and nearer to what a model was trained on?

Everything here takes features, tensors with one row a picture as `helpers.evaluation.encoders` gives them, and knows
nothing about models. Arithmetic is float64: with sigma 10 the kernel of two rows of length 1 lies between 0.98 and 1,
so that the squared distances below are small differences of large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from helpers.evaluation.measures import Measure, bootstrap, wilson

SCALE = 1000  # CMMD reports a thousand times the squared distance
TIE = 1e-6  # cosines closer than this are equal: the same picture encoded in another batch differs by about 1e-7


def _rows(x: Tensor, least: int = 1, what: str = "features") -> Tensor:
    """x as float64 on the CPU. Raises ValueError unless it is finite [N, D] with N >= least."""
    x = torch.as_tensor(x).detach().cpu().double()  # in this order: an Apple GPU has no float64
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{what} should be [N, D] with at least {least} rows, not {list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{what} are not all finite numbers")
    return x


def _directions(x: Tensor, least: int = 1, what: str = "features") -> Tensor:
    """The rows of x [N, D], each divided by its length. Raises ValueError as `_rows`, and for a row of length 0."""
    x = _rows(x, least, what)
    lengths = x.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise ValueError(f"a row of {what} is all zeros and has no direction")
    return x / lengths


# --- distance between two sets ----------------------------------------------------------------------------------------
def _kernel(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """Gaussian kernel [N, M] of the rows of a [N, D] and b [M, D]."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    # k(a, b) = exp(-|a - b|^2 / (2 sigma^2))
    return torch.exp(-squares.clamp_min(0) / (2 * sigma**2))


def _kernels(x: Tensor, y: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels within x [N, N], within y [M, M] and across [N, M]. Raises ValueError as `mmd`."""
    x, y = _rows(x, 2, "x"), _rows(y, 2, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} features a row and y has {y.shape[1]}: were they encoded alike?")
    if sigma <= 0:
        raise ValueError(f"sigma should be positive, not {sigma}")
    return _kernel(x, x, sigma), _kernel(y, y, sigma), _kernel(x, y, sigma)


def _within(kernel: Tensor, counts: Tensor) -> Tensor:
    """Mean kernel [B] of two different pictures, in B samples that hold picture i counts[b, i] times.

    kernel [N, N], counts [B, N]. Two copies of one picture are no pair, so that resampling adds no ones to the mean.
    NaN for a sample that holds a single picture, N times.
    """
    different = kernel - torch.diag(kernel.diag())
    size = counts.sum(1)
    # sum over i != j of c_i c_j k_ij, divided by the number of such pairs, (sum c_i)^2 - sum c_i^2
    return ((counts @ different) * counts).sum(1) / (size**2 - (counts**2).sum(1))


def _across(kernel: Tensor, counts_x: Tensor, counts_y: Tensor) -> Tensor:
    """Mean kernel [B] of a picture of x and one of y. kernel [N, M], counts [B, N] and [B, M]."""
    return ((counts_x @ kernel) * counts_y).sum(1) / (counts_x.sum(1) * counts_y.sum(1))


def _squared_distances(kernels: tuple[Tensor, Tensor, Tensor], counts_x: Tensor, counts_y: Tensor) -> Tensor:
    """SCALE times the unbiased squared MMD [B] of B pairs of samples, given by counts [B, N] and [B, M]."""
    within_x, within_y, across = kernels
    # MMD_u^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    return SCALE * (_within(within_x, counts_x) + _within(within_y, counts_y) - 2 * _across(across, counts_x, counts_y))


def mmd(x: Tensor, y: Tensor, sigma: float = 10.0) -> float:
    """1000 times the squared maximum mean discrepancy of x [N, D] and y [M, D], estimated without bias.

    Gretton et al. 2012, JMLR 13, equation 3, with the kernel exp(-|a - b|^2 / (2 sigma^2)). It is 0 on average for two
    samples of one distribution, and so may be negative. On CLIP features of length 1, with sigma 10 and this factor
    1000, it is CMMD (Jayasumana et al. 2024, arXiv 2401.09603). Their published code computes the biased V-statistic
    instead (Gretton's equation 5), which counts each picture's similarity to itself and so is larger, the more so the
    fewer pictures: never set its numbers beside these.

    Raises ValueError unless x and y are finite, equally wide and have at least two rows each.
    """
    kernels = _kernels(x, y, sigma)
    once_x, once_y = (torch.ones(1, len(k), dtype=torch.float64) for k in kernels[:2])
    return _squared_distances(kernels, once_x, once_y).item()


def mmd_interval(x: Tensor, y: Tensor, seed: int = 0, draws: int = 2000, sigma: float = 10.0) -> Measure:
    """`mmd` with its 95% percentile bootstrap interval: x and y are resampled, each by itself. n is len(x).

    A resample holds some pictures several times. Plain bootstrap would take two copies of one picture for a pair, whose
    kernel is 1, and find every resample too far from the other set. Here only copies of different pictures are pairs.

    In simulations with Gaussian features (tests/evaluation/test_distances.py) the interval holds the true distance 94
    to 98 times in 100 for sets that clearly differ. For sets that hardly differ it is up to 1.8 times as wide as it
    need be, and holds it more than 99 times: a U-statistic that is degenerate, which the bootstrap does not know
    (Arcones and Giné 1992, Annals of Statistics 20). So an interval that excludes 0 shows a difference; one that holds
    0 shows little.

    Rows count as independent. Raises ValueError as `mmd`.
    """
    kernels = _kernels(x, y, sigma)
    rng = np.random.default_rng(seed)
    # how often each of N pictures is drawn in N draws with replacement
    drawn = [rng.multinomial(len(k), np.full(len(k), 1 / len(k)), draws) for k in kernels[:2]]
    counts = [torch.from_numpy(numbers.astype(np.float64)) for numbers in drawn]
    distances = _squared_distances(kernels, counts[0], counts[1])
    if distances.isnan().all():
        raise ValueError("no resample holds two different pictures; take more draws or more pictures")
    low, high = np.nanquantile(distances.numpy(), (0.025, 0.975))  # of few pictures, some resamples hold but one
    return Measure(mmd(x, y, sigma), float(low), float(high), kernels[0].shape[0])


def fidelity(generated: Tensor, drawn: Tensor, ceiling: Tensor, seed: int = 0, draws: int = 1000) -> Measure:
    """How many times as far from drawn pictures generated ones are as the best a model could give: 1 is perfect.

    Features [N, D] of N pictures each, row i for prompt i in all three: generated; drawn by the renderer; and drawn
    again in another pose, then encoded and decoded, which no model of latents can beat. The ratio of two squared MMDs,
    both to `drawn`, with a 95% bootstrap interval over prompts. Pictures of the same prompt are alike and form no pair.
    Raises ValueError as `mmd`, for unequal N, and where the decoded pictures cannot be told from drawn ones.
    """
    if not len(generated) == len(drawn) == len(ceiling):
        raise ValueError(f"one row a prompt in each: {len(generated)}, {len(drawn)} and {len(ceiling)} rows differ")
    kernels = [_kernels(x, drawn, 10.0) for x in (generated, ceiling)]
    n = len(drawn)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    once = torch.ones(1, n, dtype=torch.float64)

    def ratio(counts: Tensor) -> Tensor:
        # MMD^2 with the mean over i != j in the term across as well
        far, near = (_within(a, counts) + _within(b, counts) - 2 * _within(c, counts) for a, b, c in kernels)
        return far / near.where(near > 0, torch.nan)

    value = ratio(once).item()
    if math.isnan(value):
        raise ValueError("decoded pictures look like drawn ones to these features: take more pictures")
    low, high = np.nanquantile(ratio(torch.from_numpy(counts.astype(np.float64))).numpy(), (0.025, 0.975))
    return Measure(value, float(low), float(high), n)


# --- variety ----------------------------------------------------------------------------------------------------------
def diversity(groups: Sequence[Tensor], seed: int = 0, draws: int = 2000) -> Measure:
    """Mean cosine distance between two pictures of the same prompt, with a bootstrap interval over prompts.

    groups: for each prompt the features [k, D] of its k >= 2 pictures, of any length. 0: all pictures of a prompt are
    the same; 1: they have nothing in common. Every prompt counts once, however many pictures it has.
    Raises ValueError for no groups and for a group of fewer than two pictures.
    """
    return bootstrap([_spread(_directions(group, 2, "a group")) for group in groups], seed, draws)


def diversity_ratio(groups: Sequence[Tensor], others: Sequence[Tensor], seed: int = 0, draws: int = 2000) -> Measure:
    """Mean spread of `groups` divided by that of `others`, prompt for prompt the same, with a bootstrap interval.

    1: pictures of a prompt differ as much in both. Raises ValueError as `diversity`, and for unequal numbers of groups.
    """
    if len(groups) != len(others) or not groups:
        raise ValueError(f"as many groups on both sides, not {len(groups)} and {len(others)}")
    spreads = np.array([[_spread(_directions(g, 2, "a group")) for g in side] for side in (groups, others)])
    rows = np.random.default_rng(seed).integers(0, len(groups), (draws, len(groups)))
    top, bottom = spreads[:, rows].mean(-1)
    low, high = np.quantile(top / bottom, (0.025, 0.975))
    return Measure(float(spreads[0].mean() / spreads[1].mean()), float(low), float(high), len(groups))


def _spread(unit: Tensor) -> float:
    """Mean of 1 - cosine over the pairs of k rows of length 1, [k, D]."""
    k = len(unit)
    # sum over i != j of u_i . u_j = |sum u_i|^2 - k, in k (k - 1) pairs
    cosine = ((unit.sum(0) ** 2).sum() - k) / (k * (k - 1))
    return 1 - cosine.item()


# --- nearness to the training pictures --------------------------------------------------------------------------------
def nearest(x: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x [N, D] the most similar of the references [M, D]: its index int64 [N] and cosine float64 [N].

    Of equally similar ones it is any. Raises ValueError for no rows, rows of zeros and unequal D.
    """
    x, references = _directions(x, 1, "x"), _directions(references, 1, "references")
    if x.shape[1] != references.shape[1]:
        raise ValueError(f"x has {x.shape[1]} features a row and the references have {references.shape[1]}")
    cosines, indices = (x @ references.T).max(1)
    return indices, cosines


def copy_share(x: Tensor, train: Tensor, held_out: Tensor, seed: int = 0) -> Measure:
    """Share of the rows of x [N, D] that are nearer to a training picture than to any held-out one, with its interval.

    A model that has learned the style, not the pictures, is as often nearest to either: 50%. That needs as many of
    each, since of more pictures the nearest is nearer: of the larger set, a part as large as the smaller one is drawn
    with `seed`. A row that is as near to both (to TIE) counts half. Wilson's interval takes whole numbers, so an odd
    tie is rounded down, against copying.

    The interval is for these two sets, and for rows that are independent of each other. It leaves out the luck of which
    pictures were held out: in simulations a model that copies nothing lies outside it 3 to 11 times in 100, most often
    with 10 pictures of each, where one that resembles much draws many rows.
    Raises ValueError as `nearest`.
    """
    count = min(len(train), len(held_out))
    g = torch.Generator().manual_seed(seed)
    train, held_out = (rows[torch.randperm(len(rows), generator=g)[:count]] for rows in (train, held_out))
    ahead = nearest(x, train)[1] - nearest(x, held_out)[1]
    nearer, ties = int((ahead > TIE).sum()), int((ahead.abs() <= TIE).sum())
    return wilson(nearer + ties // 2, len(x))


def shuffled_shares(chosen: list[int], pool: int, seed: int = 0, draws: int = 1000) -> np.ndarray:
    """What chance gives as the share of copies: [draws] shares of `chosen` that random halves of a pool hold.

    chosen: for each generated picture, which of the `pool` real ones is most similar to it. Had none been trained on,
    the names "training" and "held-out" would mean nothing, and could be dealt out anew (Fisher's permutation test).
    The spread holds the luck of which pictures were held out, and that one picture can be nearest to many.
    """
    counts = np.bincount(chosen, minlength=pool)  # how many generated pictures each real one is nearest to
    halves = np.tile(np.arange(pool) < pool // 2, (draws, 1))
    halves = np.random.default_rng(seed).permuted(halves, axis=1)
    return halves @ counts / len(chosen)


# --- two pictures, pixel by pixel ---------------------------------------------------------------------------------
def pixel_distances(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
    """Mean |difference| of the pixels in grey levels (0..255), for each pair of pictures of one size.

    Raises ValueError unless there are as many of the one as of the other.
    """
    pairs = zip(pictures, others, strict=True)
    return [float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()) for a, b in pairs]
