"""Measuring generated pictures: is the style right, is the content what the prompt asked for, and how sure are we?

On MiniSD the judge is the drawn world's classifier (helpers.evaluation.classifier), since a prompt is made from a scene
whose every attribute is known. Every number comes with its count and a 95% interval, and is read beside controls: the
base model and a random adapter of the same norm as the trained one.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from helpers import lora
from helpers.adapters.loading import load_adapter
from helpers.diffusion.components import Components
from helpers.diffusion.pictures import to_tensor
from helpers.diffusion.sampling import generate
from helpers.evaluation.classifier import HEADS, load_classifier
from helpers.world.captions import EXPRESSION_WORDS, prompt
from helpers.world.scenes import (
    BACKDROPS,
    BACKGROUNDS,
    EYEWEAR,
    HEADWEAR,
    NECKWEAR,
    PROPS,
    STYLES,
    SUBJECTS,
    WEAR_COLORS,
    Scene,
    sample_scene,
)

# An attribute is scored only where a style shows it: no colours in one-ink styles, no background in a chalkboard, and
# vintage paper fades blue and gray backgrounds to nearly the same tone. Pixels and glass have no gradient backdrops.
_ALWAYS = ("subject", "headwear", "eyewear", "neckwear", "expression", "prop")
_COLORED = (*_ALWAYS, "headwear_color", "neckwear_color", "clothes_color", "prop_color", "background", "backdrop")
SCORED: dict[str, tuple[str, ...]] = {style: _COLORED for style in STYLES} | {
    "sketch": _ALWAYS,
    "blueprint": _ALWAYS,
    "chalkboard": _ALWAYS,
    "vintage": tuple(a for a in _COLORED if a != "background"),
    "pixel": tuple(a for a in _COLORED if a != "backdrop"),
    "stained_glass": tuple(a for a in _COLORED if a != "backdrop"),
}
Z95 = 1.959963984540054  # the normal quantile of a two-sided 95% interval


@dataclass(frozen=True)
class Measure:
    """A mean of `n` values with its 95% interval."""

    value: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high)."""
        return self.low, self.high


def wilson(successes: int, n: int) -> Measure:
    """Share successes / n with Wilson's score interval (Wilson 1927, JASA 22). Raises ValueError for n < 1."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} is no share")
    p = successes / n
    # (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    middle = p + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return Measure(p, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale), n)


def bootstrap(values: Sequence[float] | np.ndarray, seed: int = 0, draws: int = 2000) -> Measure:
    """Mean of the values with its percentile bootstrap interval (Efron 1979). Raises ValueError for no values."""
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        raise ValueError("no values to average")
    rows = np.random.default_rng(seed).integers(0, x.size, (draws, x.size))
    low, high = np.quantile(x[rows].mean(1), (0.025, 0.975))
    return Measure(float(x.mean()), float(low), float(high), int(x.size))


@dataclass(frozen=True)
class Verdict:
    """The judge's answers on N pictures: names {attribute: [N]} and style probabilities [N, len(STYLES)].

    A judge may know fewer attributes than the scenes have: `names` holds those it knows.
    """

    names: dict[str, list[str]]
    styles: np.ndarray

    def style_probability(self, style: str) -> np.ndarray:
        """Probability [N] that each picture is in this style."""
        return self.styles[:, STYLES.index(style)]


@torch.inference_mode()
def judge(pictures: Sequence[Image.Image], classifier: nn.Module | None = None, batch_size: int = 64) -> Verdict:
    """Classify pictures, each of any size; the classifier that ships with MiniSD is loaded unless one is given.

    classifier: any module that makes logits per attribute of a batch in -1..1, such as `helpers.evaluation.probe`'s.
    Raises ValueError when there are no pictures.
    """
    if not pictures:
        raise ValueError("there are no pictures to judge")
    classifier = classifier or load_classifier()
    names: dict[str, list[str]] = {}
    styles = []
    side = min(min(picture.size) for picture in pictures)  # the classifier brings it to its own input's
    for start in range(0, len(pictures), batch_size):
        batch = torch.stack([to_tensor(picture, side) for picture in pictures[start : start + batch_size]])
        logits = classifier(batch)
        styles.append(logits["style"].softmax(-1).numpy())
        for attribute, out in logits.items():
            seen = names.setdefault(attribute, [])
            seen += [HEADS[attribute][i] for i in out.argmax(-1).tolist()]
    return Verdict(names, np.concatenate(styles))


def asked(scene: Scene, attribute: str) -> bool:
    """True unless a prompt of the scene cannot say it: the colour of something that is not there, or a neutral face.

    No hat is an answer too: a prompt without headwear asks for a bare head. But no hat has no colour to score, and
    captions without a word for the expression describe every face.
    """
    if attribute == "expression":
        return scene.expression in EXPRESSION_WORDS
    part = attribute.removesuffix("_color")
    return getattr(scene, part, "shown") != "none" if attribute.endswith("_color") else True


def agreement(scenes: Sequence[Scene], verdict: Verdict, style: str) -> dict[str, Measure]:
    """Share of pictures in which the judge sees what the scene says, per attribute that the style shows.

    Colours of hats and neckwear count only in scenes that have them; what the judge does not know is left out.
    Raises ValueError for an unknown style.
    """
    if style not in SCORED:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(SCORED)}")
    out = {}
    for attribute in filter(verdict.names.__contains__, SCORED[style]):
        rows = [i for i, scene in enumerate(scenes) if asked(scene, attribute)]
        right = sum(verdict.names[attribute][i] == getattr(scenes[i], attribute) for i in rows)
        if rows:
            out[attribute] = wilson(right, len(rows))
    return out


def content_shares(scenes: Sequence[Scene], verdict: Verdict, style: str) -> np.ndarray:
    """For each of N pictures the share [N] of its scene's attributes that the judge sees, as `agreement` counts them.

    Every picture counts once, however many attributes its scene has. Raises ValueError for an unknown style.
    """
    if style not in SCORED:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(SCORED)}")
    known = [attribute for attribute in SCORED[style] if attribute in verdict.names]
    right = [
        [verdict.names[attribute][i] == getattr(scene, attribute) for attribute in known if asked(scene, attribute)]
        for i, scene in enumerate(scenes)
    ]
    return np.array([np.mean(row) for row in right])


def _named_thing(text: str, names: Sequence[str]) -> tuple[str, str] | None:
    """(name, its colour or "") of the first of the names in the text, longer names first ("bow tie" before "tie")."""
    for name in sorted(names, key=len, reverse=True):
        if name != "none" and (found := re.search(rf"(?:({'|'.join(WEAR_COLORS)}) )?\b{name}\b", text)):
            return name, found[1] or ""
    return None


def named(text: str) -> dict[str, str]:
    """The attributes that a prompt in the drawn world's words names: {"subject": "man", "neckwear": "scarf", …}.

    What the prompt leaves open is left out, unlike in `agreement`, where a whole scene is known. "as a sheriff" means
    a cowboy hat and a star.
    """
    text = text.lower()
    out = {}
    worn = {"headwear": HEADWEAR, "eyewear": EYEWEAR, "neckwear": NECKWEAR, "prop": PROPS}
    for attribute, names in worn.items():
        if thing := _named_thing(text, names):
            out[attribute] = thing[0]
            if thing[1]:
                out[f"{attribute}_color"] = thing[1]
    if subject := _named_thing(text, SUBJECTS):
        out["subject"] = subject[0]
    if "as a sheriff" in text:
        out |= {"headwear": "cowboy hat", "badge": "sheriff star"}
    if found := re.search(rf"\b({'|'.join(WEAR_COLORS)}) shirt\b", text):
        out["clothes_color"] = found[1]
    behind = "|".join(["background", *BACKDROPS[1:]])
    if found := re.search(rf"\b({'|'.join(BACKGROUNDS)}) ({behind})\b", text):
        out["background"] = found[1]
        if found[2] != "background":
            out["backdrop"] = found[2]
    for expression, word in EXPRESSION_WORDS.items():
        if re.search(rf"\b{word}\b", text):
            out["expression"] = expression
    return out


def content_counts(prompts: Sequence[str], verdict: Verdict, style: str) -> list[tuple[int, int]]:
    """For each picture (right, named): how many of the attributes that its prompt names and its style shows are seen.

    For a few pictures of prompts written by hand. Raises ValueError for an unknown style.
    """
    if style not in SCORED:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(SCORED)}")
    counts = []
    for i, text in enumerate(prompts):
        wanted = {name: value for name, value in named(text).items() if name in SCORED[style]}
        counts.append((sum(verdict.names[name][i] == value for name, value in wanted.items()), len(wanted)))
    return counts


def evaluation_scenes(count: int, seed: int = 1000, pairs: str = "train") -> list[Scene]:
    """Scenes to write prompts from, drawn with their own seed; scene k does not depend on `count`."""
    return [sample_scene(random.Random(f"evaluation/{seed}/{k}"), pairs) for k in range(count)]


@dataclass(frozen=True)
class Evaluation:
    """Pictures generated from scenes' prompts, and what the judge says of them."""

    scenes: list[Scene]
    prompts: list[str]
    pictures: list[Image.Image]
    verdict: Verdict

    def style(self, style: str) -> Measure:
        """Mean probability of the style, with a bootstrap interval over prompts."""
        return bootstrap(self.verdict.style_probability(style))

    def content(self, style: str) -> dict[str, Measure]:
        """Agreement with the prompt per attribute that the style shows."""
        return agreement(self.scenes, self.verdict, style)


def evaluate(
    components: Components, style: str | None, count: int, pairs: str = "train", seed: int = 1000, **settings
) -> Evaluation:
    """Generate one picture for each of `count` scenes' prompts in the style's wording, and judge them.

    Prompt k and its initial noise are the same whatever adapter the U-Net carries. settings go to `generate`.
    """
    scenes = evaluation_scenes(count, seed, pairs)
    prompts = [prompt(scene, style) for scene in scenes]
    pictures = generate(components, prompts, [seed + k for k in range(count)], **settings)
    return Evaluation(scenes, prompts, pictures, judge(pictures))


@contextmanager
def adapted(components: Components, path: str | os.PathLike | None) -> Iterator[torch.nn.Module]:
    """Within the block the model carries the adapter in a file or folder; None means the base model.

    Gives the U-Net, and takes the adapter out at the end, whatever happens. Raises AdapterError as `load_adapter`, also
    for an adapter that was trained for another prediction type.
    """
    if path is not None:
        expect = {"prediction_type": components.prediction_type}
        load_adapter(path, components.unet, components.text_encoder, expect)
    try:
        yield components.unet
    finally:
        if path is not None:
            lora.remove(components.unet)
            lora.remove(components.text_encoder)


@contextmanager
def random_adapter(unet: torch.nn.Module, seed: int = 0) -> Iterator[None]:
    """Control: within the block, each LoRA layer holds Gaussian A and B whose update has the trained one's norm.

    For every layer ||B' A'||_F = ||B A||_F, so that the change is as large as the adapter's but says nothing.
    The trained A and B come back, bit for bit. Raises ValueError for a U-Net without LoRA layers, and for DoRA, whose
    magnitude has no such control.
    """
    g = torch.Generator().manual_seed(seed)
    layers = list(lora.lora_layers(unet).values())
    if not layers:
        raise ValueError("a random adapter takes its shape and norm from a trained one: load an adapter first")
    if any("lora_magnitude_vector" in layer.parameters_by_name() for layer in layers):
        raise ValueError("a random adapter stands beside plain LoRA, and this is DoRA")
    trained = [(layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()) for layer in layers]
    norms = [lora.delta_weight(layer).norm().detach() for layer in layers]
    try:
        with torch.no_grad():
            for layer, norm in zip(layers, norms, strict=True):
                for weight in (layer.lora_A.weight, layer.lora_B.weight):
                    weight.copy_(torch.randn(weight.shape, generator=g))
                layer.lora_B.weight.mul_(norm / lora.delta_weight(layer).norm())
        yield
    finally:
        with torch.no_grad():
            for layer, (a, b) in zip(layers, trained, strict=True):
                layer.lora_A.weight.copy_(a)
                layer.lora_B.weight.copy_(b)
