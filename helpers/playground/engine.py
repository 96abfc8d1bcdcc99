"""The playground's engine: settings, the picture that belongs to them, and both in one file.

The pictures are those of `helpers.diffusion.sampling.generate`, bit for bit, and adapters are mixed by
`helpers.lora.lowrank.compose`. What one can press and move is in `helpers.playground.widgets`; `play` displays it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from helpers import lora
from helpers.diffusion.components import Components, load_components
from helpers.diffusion.pictures import to_pictures, to_pil
from helpers.diffusion.sampling import generate, initial_latents
from helpers.evaluation.measures import adapted
from helpers.lora.lowrank import LoRAWeights, attach, compose, weights_of
from helpers.presets.configuration import Preset
from helpers.training.runs import find_run, run_key
from helpers.world.captions import caption, prompt
from helpers.world.scenes import BASE_STYLES, HELD_OUT_STYLES, Scene, sample_scene

VERSION = 1  # of the settings in a file; another one is refused
CHUNK = "lora-by-hand"  # the name of the PNG's tEXt chunk
STYLES = HELD_OUT_STYLES  # an adapter each
ADAPTERS = ("none", *STYLES, "mix")
LIMITS = {
    "seed": (0, 2**32 - 1),
    "steps": (1, 50),
    "guidance": (1.0, 15.0),
    "doodles": (0.0, 1.5),
    "vintage": (0.0, 1.5),
    "scale": (-1.0, 2.0),
}
MAX_CHARACTERS = 2000  # of a prompt that is worth counting tokens of
MAX_FILE = 20_000_000  # bytes
PREVIEWS = 8  # of one picture, at most
FIRST = {  # the portrait that the playground opens with
    "subject": "rabbit",
    "color": "white",
    "headwear": "beanie",
    "headwear_color": "blue",
    "eyewear": "none",
    "neckwear": "scarf",
    "neckwear_color": "red",
    "clothes_color": "green",
    "background": "yellow",
}
QUICK = 12  # steps that MiniSD takes at first: a picture in about half a second; the chapters take 25


class PlaygroundError(ValueError):
    """Something that the person in front of the playground can mend; the message is a sentence for them."""


class Cancelled(Exception):
    """Raised between two steps of a picture that nobody wants any more."""


# ---------------------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Settings:
    """All that a picture depends on, besides the model and its adapters. Raises PlaygroundError for a wrong value.

    doodles, vintage: the weights of the two adapters, read where `adapter` is "mix"; scale: of whatever is adapted.
    """

    prompt: str
    seed: int = 0
    steps: int = 25
    guidance: float = 4.0
    adapter: str = "none"
    doodles: float = 0.5
    vintage: float = 0.5
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise PlaygroundError(f"The prompt should be text, not {self.prompt!r:.40}.")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):
            raise PlaygroundError("The prompt has a character that is no text: half of an emoji, say.")
        if self.adapter not in ADAPTERS:
            raise PlaygroundError(f"The adapter should be one of {', '.join(ADAPTERS)}, not {self.adapter!r:.40}.")
        for name, (low, high) in LIMITS.items():
            value, whole = getattr(self, name), isinstance(low, int)
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not fits or not low <= value <= high:  # NaN is not
                kind = "whole number" if whole else "number"
                raise PlaygroundError(
                    f"The {name} should be a {kind} from {low:.10g} to {high:.10g}, not {value!r:.40}."
                )

    @property
    def of_base(self) -> Settings:
        """The same picture without any adapter."""
        return Settings(self.prompt, self.seed, self.steps, self.guidance)

    @property
    def title(self) -> str:
        """A few words: "doodles × 0.8, seed 3"."""
        scale = "" if self.scale == 1 else f" × {self.scale:g}"
        names = {"none": "base model", "mix": f"doodles {self.doodles:g} + vintage {self.vintage:g}"}
        return f"{names.get(self.adapter, self.adapter)}{scale if self.adapter != 'none' else ''}, seed {self.seed}"


def build_prompt(words: str, **parts: str) -> str:
    """The canonical sentence for a portrait: parts are fields of `Scene`, those not named are "none".

    words: a style whose words it gets, or "mix" for the words of both adapters' styles.
    """
    fields = [field.name for field in dataclasses.fields(Scene) if field.default is dataclasses.MISSING]
    chosen: dict[str, Any] = dict.fromkeys(fields, "none") | parts
    scene = Scene(**chosen)
    return f"{prompt(scene, 'doodles')}, vintage style" if words == "mix" else prompt(scene, words)


@cache
def known_words() -> frozenset[str]:
    """The words in the captions of MiniSD's pretraining and of the two adapters' datasets."""
    rng, styles = random.Random(0), (*BASE_STYLES, *HELD_OUT_STYLES)
    texts = [caption(sample_scene(rng, "all"), styles[i % len(styles)], rng) for i in range(2000)]
    return frozenset(written_words(" ".join(texts)))


def written_words(text: str) -> list[str]:
    """Words and single signs of a text (an emoji is a sign), lower case; punctuation is left out."""
    return re.findall(r"[^\W_]+|[^\w\s.,;:!?'’\"“”()\-_/]", text.lower().replace("\ufe0f", ""))


# ------------------------------------------------------------------------------------------------------ drawing
Adapters = Mapping[str, Mapping[str, LoRAWeights]]


def find_adapters(preset: Preset, components: Components) -> tuple[dict[str, dict[str, LoRAWeights]], dict[str, str]]:
    """{style: its adapter} and {style: its run's key}, of the finished runs that there are. Nothing is trained."""
    adapters, keys = {}, {}
    for name in STYLES:
        key = run_key(preset, name)
        if run := find_run(preset, name, key):
            with adapted(components, run.adapter) as unet:
                adapters[name], keys[name] = weights_of(unet), key
    return adapters, keys


def predicted_picture(before: Tensor, after: Tensor, t: int, previous: int, alphas_cumprod: Tensor) -> Tensor:
    """The clean latents [B, C, h, w] that one DDIM step from t to previous < t was aiming at.

    before, after: latents at the two timesteps; a negative `previous` means the end, which takes alpha-bar of 0.
    """
    # Both are a sum of the same two unknowns, x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps: solved for x_0
    a, b = alphas_cumprod[t], alphas_cumprod[max(previous, 0)]
    return ((1 - a).sqrt() * after - (1 - b).sqrt() * before) / ((1 - a).sqrt() * b.sqrt() - (1 - b).sqrt() * a.sqrt())


OnStep = Callable[[int, Image.Image | None], None]


class Engine:
    """A model and its adapters. It draws one picture at a time; a second thread waits for the first one.

    adapters: {"doodles": …, "vintage": …} as `weights_of` gives them, by default those of the preset's finished runs.
    """

    def __init__(self, preset: Preset, components: Components | None = None, adapters: Adapters | None = None):
        self.preset, self.components = preset, components or load_components(preset)
        found = (adapters, {}) if adapters is not None else find_adapters(preset, self.components)
        self.adapters, self.keys = found
        self._lock = threading.Lock()

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of `Settings.adapter` that can be drawn."""
        there = [name for name in STYLES if name in self.adapters]
        return ("none", *there, *(["mix"] if len(there) == len(STYLES) else []))

    def default(self, text: str = "") -> Settings:
        """The settings that the playground opens with."""
        adapter = "doodles" if "doodles" in self.adapters else "none"
        steps = self.preset.num_inference_steps
        steps = min(steps, QUICK) if self.components.is_minisd else steps
        return Settings(text, steps=steps, guidance=self.preset.guidance_scale, adapter=adapter)

    def check(self, settings: Settings) -> None:
        """Raise PlaygroundError for settings that this model cannot draw."""
        if settings.adapter not in self.choices:
            missing = next(name for name in (settings.adapter, *STYLES) if name in STYLES and name not in self.adapters)
            raise PlaygroundError(f"There is no finished run of {missing} yet: notebook 04 makes one.")
        text, limit = settings.prompt, self.components.text_encoder.config.max_position_embeddings
        if len(text) > MAX_CHARACTERS:
            raise PlaygroundError(f"The prompt has {len(text):,} characters. Shorten it: a sentence will do.")
        tokens = len(self.components.tokenizer([text], verbose=False).input_ids[0])
        if tokens > limit:
            raise PlaygroundError(f"The prompt has {tokens} tokens, and the model reads {limit}. Shorten it.")

    def remark(self, settings: Settings) -> str:
        """What is worth knowing about a prompt that can be drawn, a sentence or ""."""
        if not settings.prompt.strip():
            return "Without words the model draws whatever it likes."
        if not self.components.is_minisd:
            return ""
        new = [word for word in dict.fromkeys(written_words(settings.prompt)) if word not in known_words()]
        listed = ", ".join(word[:20] for word in new[:5]) + (" …" if len(new) > 5 else "")
        return f"In no caption that the model was trained on: {listed}." if new else ""

    def draw(
        self, settings: Settings, on_step: OnStep | None = None, cancel: threading.Event | None = None
    ) -> Image.Image:
        """The picture of these settings, as `generate` draws it.

        on_step(steps done, what the picture looks like by then, or None where it was not looked at).
        Raises Cancelled before the next step once `cancel` is set, and PlaygroundError as `check`.
        """
        self.check(settings)
        c, steps = self.components, settings.steps
        alphas_cumprod = c.noise_scheduler.alphas_cumprod
        stride = c.noise_scheduler.config.num_train_timesteps // steps
        look = math.ceil(steps / PREVIEWS)
        before = initial_latents(c, [settings.seed])

        def after_step(step: int, t: int, latents: Tensor) -> None:
            nonlocal before
            if cancel is not None and cancel.is_set():
                raise Cancelled
            seen = None
            if on_step is not None and step % look == 0 and step + 1 < steps:
                seen = to_pil(to_pictures(c, predicted_picture(before, latents, t, t - stride, alphas_cumprod)))[0]
            before = latents
            if on_step is not None:
                on_step(step + 1, seen)

        sampling = {"num_inference_steps": steps, "guidance_scale": settings.guidance, "callback": after_step}
        with self._lock, self._adapted(settings):
            return generate(c, [settings.prompt], [settings.seed], **sampling)[0]

    @contextmanager
    def _adapted(self, settings: Settings) -> Iterator[None]:
        """Within the block the U-Net carries what the settings ask for, as notebooks 05 and 10 put it there."""
        if settings.adapter == "none":
            yield
            return
        weights = {"doodles": settings.doodles, "vintage": settings.vintage}
        chosen = self.adapters.get(settings.adapter) or compose([(self.adapters[n], weights[n]) for n in STYLES])
        attach(self.components.unet, chosen)
        try:
            with lora.scaled(self.components.unet, settings.scale):
                yield
        finally:
            lora.remove(self.components.unet)


# -------------------------------------------------------------------------------------------- a picture as a file
def png_with_settings(picture: Image.Image, engine: Engine, settings: Settings) -> bytes:
    """A PNG file whose tEXt chunk holds the settings as JSON, and the version, preset and runs that they are for."""
    facts = {"version": VERSION, "preset": engine.preset.name, "runs": engine.keys, **dataclasses.asdict(settings)}
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(CHUNK, json.dumps(facts))  # ASCII: whatever the prompt's letters, they survive
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=chunk)
    return buffer.getvalue()


def read_settings(data: bytes, engine: Engine) -> tuple[Settings, str]:
    """The settings in a PNG file's bytes, and a remark or "". Raises PlaygroundError, saying what is wrong."""
    if len(data) > MAX_FILE:
        raise PlaygroundError(f"The file has {len(data) / 1e6:.0f} MB: no picture of the playground is that large.")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            text = picture.info.get(CHUNK)
    except Exception as error:  # whatever a damaged file makes of the decoder
        raise PlaygroundError("The file is not a PNG picture, or it is damaged.") from error
    if not isinstance(text, str):
        raise PlaygroundError("The picture carries no settings: it was not saved by the playground, or saved again.")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlaygroundError("The settings in the picture are damaged: they are not JSON.") from error
    if not isinstance(facts, dict) or facts.get("version") != VERSION or isinstance(facts["version"], bool):
        found = facts.get("version") if isinstance(facts, dict) else None
        raise PlaygroundError(f"The settings have version {found!r:.40}, this playground reads version {VERSION}.")
    wanted = {"version", "preset", "runs", *(field.name for field in dataclasses.fields(Settings))}
    if missing := sorted(wanted - facts.keys()):
        raise PlaygroundError(f"The settings in the picture lack {', '.join(missing)}.")
    if unknown := sorted(facts.keys() - wanted):
        raise PlaygroundError(f"The settings in the picture have an unknown {unknown[0]!r:.40}.")
    if facts["preset"] != engine.preset.name:
        theirs = facts["preset"]
        raise PlaygroundError(f"The picture is of the preset {theirs!r:.40}, and this is {engine.preset.name!r}.")
    if not isinstance(facts["runs"], dict):
        raise PlaygroundError(f"The runs should be named by style, not {facts['runs']!r:.40}.")
    settings = Settings(**{field.name: facts[field.name] for field in dataclasses.fields(Settings)})
    engine.check(settings)
    used = {"none": (), "mix": STYLES}.get(settings.adapter, (settings.adapter,))
    other = [name for name in used if facts["runs"].get(name) != engine.keys.get(name)]
    return settings, f"Your {' and '.join(other)} adapter is from another run: the picture will differ." * bool(other)


def enlarged(picture: Image.Image, side: int = 384) -> Image.Image:
    """The picture at least `side` pixels wide if it is smaller, by a whole factor and without smoothing."""
    factor = max(1, math.ceil(side / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def before_after(before: Image.Image, after: Image.Image, share: float) -> Image.Image:
    """`before` left of a boundary, `after` right of it; share: how much of the width `before` gets, 0 … 1.

    Raises ValueError for another share, or pictures of different sizes.
    """
    if not 0 <= share <= 1 or before.size != after.size:
        raise ValueError(f"a share of 0 to 1 and pictures of one size, not {share}, {before.size} and {after.size}")
    both = after.convert("RGB")
    x = round(share * both.width)
    both.paste(before.convert("RGB").crop((0, 0, x, both.height)), (0, 0))
    if 0 < x < both.width:
        ImageDraw.Draw(both).line([(x, 0), (x, both.height)], fill="white", width=max(1, both.width // 128))
    return both
