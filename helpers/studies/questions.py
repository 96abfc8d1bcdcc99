"""What the studies ask: which settings are compared, on which pictures, with which seeds.

A study has one centre, the course's own settings, and varies one factor at a time from there; `helpers.studies.trials`
trains and measures one point with one seed, `helpers.studies.sweep` goes through all of them, and
`helpers.studies.effects` reads the results. Each level costs a training run: two per factor show a direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from helpers.base.paths import ROOT
from helpers.presets.configuration import ATTENTION, Datasets, DatasetSpec, Preset
from helpers.presets.variants import get_preset
from helpers.world.datasets import default_rows

FOLDER = ROOT / "report" / "studies"  # where finished studies are kept, one JSON file each
CENTRE = "centre"
CONTROLS = ("base", "random", "other", "drawn")
NEVER = 10**6  # epochs between two validations: more than any run has


@dataclass(frozen=True)
class Point:
    """One combination of settings. factor: what is varied; label: its value, as figures write it.

    settings: fields of `TrainConfig`; `rows` and `source` of the dataset; `method` "full" for training every weight;
    `control` for one of CONTROLS, which trains nothing of its own.
    """

    factor: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """What the study calls the point: "rows=16"."""
        return f"{self.factor}={self.label}" if self.label else self.factor


@dataclass(frozen=True)
class Study:
    """Points, seeds, and how each of them is measured.

    style: of the drawn world, which the adapters learn. base: settings of all points, the centre included.
    measured_at: steps after which a run is measured, the last one included. prompts: pictures drawn and judged at each
    measurement; loss_rows: training and held-out pictures whose loss is measured. copies: whether to compare with
    training and held-out pictures. unprompted: whether to count what is drawn that the prompt does not ask for.
    """

    name: str
    question: str
    style: str
    points: tuple[Point, ...]
    measured_at: tuple[int, ...]
    base: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seeds: tuple[int, ...] = (0, 1, 2)
    prompts: int = 64
    loss_rows: int = 32
    copies: bool = False
    unprompted: bool = False

    @property
    def steps(self) -> int:
        """How long each run trains."""
        return self.measured_at[-1]

    @property
    def file(self) -> Path:
        """Where the finished study is kept."""
        return FOLDER / f"{self.name}.json"

    def point(self, name: str) -> Point:
        """The point of that name. Raises ValueError when there is none."""
        for point in self.points:
            if point.name == name:
                return point
        known = ", ".join(point.name for point in self.points)
        raise ValueError(f"the study {self.name!r} has no point {name!r}; it has {known}")

    def preset(self, point: Point, seed: int, style: str | None = None) -> tuple[Preset, DatasetSpec]:
        """The preset that trains a point with a seed, and its dataset: the drawn one of `style` (default: the study's).

        Validation pictures are left out, and every measured step keeps its checkpoint.
        """
        style = style or self.style
        settings = {**self.base, **point.settings}
        for name in ("method", "control"):
            settings.pop(name, None)
        rows = settings.pop("rows", default_rows(style, "train"))
        spec = DatasetSpec(
            style, settings.pop("source", f"drawn:{style}"), train_rows=rows, held_out_rows=max(rows, self.loss_rows)
        )
        every = min(self.measured_at)
        settings = {
            "steps": self.steps,
            "seed": seed,
            "validation_epochs": NEVER,
            "early_validations": (),
            "held_out_eval": 0,
            "checkpoint_every": every,
            "keep_checkpoints": self.steps // every,
            "validation_prompts": {},
            "datasets": Datasets((spec,)),
            **settings,
        }
        return get_preset("mini", **settings), spec


def _varied(factor: str, settings: Mapping[str, Mapping[str, Any]]) -> tuple[Point, ...]:
    return tuple(Point(factor, label, values) for label, values in settings.items())


def _numbers(name: str, *values: float) -> tuple[Point, ...]:
    return _varied(name, {f"{value:g}": {name: value} for value in values})


def _controls(*names: str) -> tuple[Point, ...]:
    return _varied("control", {name: {"control": name} for name in names})


_CONTROLS = _controls(*CONTROLS)
# How a study that measures its runs at 125 steps first keeps them: others that say the same share what they train.
_SHARED = {"checkpoint_every": 125, "keep_checkpoints": 8}
_CROSS = tuple(f"attn2.{name}" for name in ATTENTION)
_FULL = {"method": "full", "learning_rate": 1e-4}  # every weight of the U-Net
# The three rules agree at rank 16, the centre: alpha / r = 1, and 4 / sqrt(r) = 1.
_RULES = {
    "alpha = r": lambda rank: {"alpha": float(rank)},
    "alpha = 16": lambda rank: {"alpha": 16.0},
    "rsLoRA": lambda rank: {"alpha": 4.0, "use_rslora": True},
}
_RANKS = tuple(
    point
    for rule, settings in _RULES.items()
    for point in _varied(f"rank, {rule}", {str(rank): {"rank": rank, **settings(rank)} for rank in (1, 64)})
)

HYPERPARAMETERS = Study(
    name="hyperparameters",
    question="Which setting matters: learning rate, batch size, rank and alpha, Min-SNR, targets, text encoder, DoRA?",
    style="vintage",
    measured_at=(150,),
    prompts=48,
    loss_rows=16,
    points=(
        Point(CENTRE, ""),
        *_CONTROLS,
        *_numbers("learning_rate", 3e-4, 3e-3, 1e-2),
        *_numbers("batch_size", 4, 16),
        *_RANKS,
        *_varied(
            "snr_gamma",
            {"5": {"snr_gamma": 5.0}, "5, rescaled": {"snr_gamma": 5.0, "rescale_weights": True}},
        ),
        *_varied("targets", {"cross-attention": {"targets": _CROSS}, "attention": {"targets": ATTENTION}}),
        *_varied("text encoder", {"LoRA too": {"train_text_encoder": True}}),
        *_varied("kind", {"DoRA": {"use_dora": True}}),
    ),
)

OVERFITTING = Study(
    name="overfitting",
    question="When does an adapter copy its training pictures, and what keeps it from that?",
    style="doodles",
    measured_at=(125, 500, 1000),
    seeds=(0,),
    copies=True,
    points=(
        Point(CENTRE, ""),  # 1000 pictures
        *_CONTROLS,
        *_numbers("rows", 16, 64, 256),
        Point("full fine-tuning", "1000", _FULL),
    ),
)

CAPACITY = Study(
    name="capacity",
    question="With 64 pictures, what do rank, caption dropout and training every weight change?",
    style="doodles",
    measured_at=(500,),
    seeds=(0,),
    copies=True,
    base={"rows": 64},
    points=(
        Point(CENTRE, ""),  # rank 16, dropout 0.1
        *_varied("rank at 64 rows", {str(r): {"rank": r, "alpha": float(r)} for r in (1, 64)}),
        *_varied("caption_dropout at 64 rows", {f"{p:g}": {"caption_dropout": p} for p in (0.0, 0.5)}),
        Point("full fine-tuning", "64", _FULL),
    ),
)


def _styles(style: str) -> Study:
    return Study(
        name=f"style_{style}",
        question=f"Do the same settings teach {style.replace('_', ' ')}?",
        style=style,
        measured_at=(125, 500, 1000),
        points=(Point(CENTRE, ""), *_CONTROLS),
        seeds=(0,),
    )


ROBUSTNESS = Study(
    name="robustness",
    question="What do few pictures, wrong captions and a skewed choice of pictures do?",
    style="doodles",
    measured_at=(500,),
    unprompted=True,
    points=(
        Point(CENTRE, ""),
        *_controls("base"),
        *_numbers("rows", 8),
        *_varied("wrong captions", {f"{p:.0%}": {"source": f"drawn:doodles?shuffled={p}"} for p in (0.25, 0.5)}),
        *_varied(
            "skew",
            {
                "pink backgrounds": {"source": "drawn:doodles?skew=background:pink:0.9"},
                "frowns": {"source": "drawn:doodles?skew=expression:frown:0.9"},
            },
        ),
    ),
    seeds=(0,),
)

LONG_RUN = Study(
    name="long_run",
    question="Do the settings that win a short run win after 1000 steps too, on 128 prompts?",
    style="vintage",
    measured_at=(1000,),
    base=_SHARED,
    prompts=128,
    loss_rows=16,
    seeds=(0,),
    points=(
        Point(CENTRE, ""),
        *_controls("base", "other"),
        *_numbers("learning_rate", 3e-3),
        *_varied("rank, alpha = r", {"64": {"rank": 64, "alpha": 64.0}}),
    ),
)

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        HYPERPARAMETERS,
        LONG_RUN,
        OVERFITTING,
        CAPACITY,
        ROBUSTNESS,
        *(_styles(style) for style in ("pixel", "blueprint", "stained_glass", "chalkboard")),
    )
}


def get_study(name: str, **changes: Any) -> Study:
    """The study of that name, with fields replaced. Raises ValueError for an unknown one, naming those there are."""
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; known: {', '.join(STUDIES)}")
    return replace(STUDIES[name], **changes) if changes else STUDIES[name]
