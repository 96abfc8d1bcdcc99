"""Measuring pictures: judges that name what they see, distances between sets of pictures, and intervals.

Every number comes with its count and a 95% interval, and is read beside controls.
"""

from helpers.evaluation.classifier import load_classifier
from helpers.evaluation.distances import (
    copy_share,
    diversity,
    fidelity,
    mmd,
    mmd_interval,
    nearest,
    pixel_distances,
    shuffled_shares,
)
from helpers.evaluation.encoders import load_encoder
from helpers.evaluation.imagenet import ImageNetEncoder
from helpers.evaluation.measures import (
    SCORED,
    Z95,
    Evaluation,
    Measure,
    Verdict,
    adapted,
    agreement,
    bootstrap,
    content_counts,
    content_shares,
    evaluate,
    evaluation_scenes,
    judge,
    random_adapter,
    wilson,
)
from helpers.evaluation.probe import load_probe
from helpers.evaluation.sight import through_vae

__all__ = [
    "Evaluation",
    "ImageNetEncoder",
    "Measure",
    "SCORED",
    "Verdict",
    "Z95",
    "adapted",
    "agreement",
    "bootstrap",
    "content_counts",
    "content_shares",
    "copy_share",
    "diversity",
    "evaluate",
    "evaluation_scenes",
    "fidelity",
    "judge",
    "load_classifier",
    "load_encoder",
    "load_probe",
    "mmd",
    "mmd_interval",
    "nearest",
    "pixel_distances",
    "random_adapter",
    "shuffled_shares",
    "through_vae",
    "wilson",
]
