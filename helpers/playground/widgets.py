"""The playground's widgets. `Studio` is what they show, testable without them; `Playground` is what one presses.

A picture is drawn in a background thread, which tells the studio of every step, and the studio whoever shows it.
"""

from __future__ import annotations

import base64
import dataclasses
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import ipywidgets
from IPython.display import display
from PIL import Image

from helpers.base.files import atomic_path
from helpers.base.paths import short
from helpers.course.figures import grid, show
from helpers.course.results import output_folder
from helpers.course.sliders import is_live, png
from helpers.playground.engine import (
    FIRST,
    LIMITS,
    Cancelled,
    Engine,
    PlaygroundError,
    Settings,
    before_after,
    build_prompt,
    enlarged,
    png_with_settings,
    read_settings,
)
from helpers.presets.configuration import Preset
from helpers.presets.variants import get_preset
from helpers.world.captions import COLORLESS_STYLES
from helpers.world.scenes import (
    BACKGROUNDS,
    EYEWEAR,
    HAIR_COLORS,
    HEADWEAR,
    NECKWEAR,
    SUBJECT_COLORS,
    SUBJECTS,
    WEAR_COLORS,
)


def play(preset: str | Preset) -> None:
    """Display the playground; headlessly, a figure of one prompt and seed with each choice of adapter."""
    engine = Engine(get_preset(preset) if isinstance(preset, str) else preset)
    if is_live():
        pass

        display(Playground(Studio(engine)).box)
        return
    text = build_prompt("mix", **FIRST)
    settings = dataclasses.replace(engine.default(text), seed=1)
    drawn = {name: engine.draw(dataclasses.replace(settings, adapter=name)) for name in engine.choices}
    names, last = ["base model", *list(drawn)[1:]], list(drawn)[-1]
    both = before_after(enlarged(drawn["none"]), enlarged(drawn[last]), 0.5)
    fig = grid([[*drawn.values(), both]], None, [*names, f"base | {last}"], f"{engine.components.title}: “{text}”")
    show(fig, f"One prompt and seed drawn with {', '.join(names)}; then the left half of the first beside the last.")


KEPT = 8  # pictures in the history
SIDE = 384  # pixels on a side of the picture shown
WIDE = {"width": "424px", "max_width": "calc(100% - 4px)"}  # of what fills the left column


# -------------------------------------------------------------------------------------------------------- studio
@dataclass(frozen=True)
class Drawn:
    """A finished picture and the base model's from the same noise (None: cancelled before it was drawn)."""

    settings: Settings
    picture: Image.Image
    base: Image.Image | None


class Studio:
    """What the playground knows: the picture in progress, its message, and the last pictures, newest first.

    on_change is called after every change, from whichever thread made it.
    """

    def __init__(self, engine: Engine, on_change: Callable[[], None] = lambda: None):
        self.engine, self.on_change = engine, on_change
        self.history: list[Drawn] = []
        self.current: Drawn | None = None
        self.preview: Image.Image | None = None  # of the picture in progress
        self.message, self.done, self.total = "", 0, 1
        self._bases: dict[Settings, Image.Image] = {}
        self._thread: threading.Thread | None = None
        self._cancel = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a picture is being drawn."""
        return self._thread is not None

    def say(self, message: str) -> None:
        """Show a sentence to the person in front."""
        self.message = message
        self.on_change()

    def start(self, settings: Settings) -> None:
        """Begin a picture in the background. Raises PlaygroundError, and begins nothing, if it cannot be drawn."""
        if self.busy:
            raise PlaygroundError("One picture at a time: cancel this one, or wait for it.")
        self.engine.check(settings)
        self._cancel = threading.Event()
        self.done, self.total = 0, settings.steps
        if settings.adapter != "none" and settings.of_base not in self._bases:
            self.total *= 2
        self._thread = threading.Thread(target=self._work, args=(settings, self._cancel), daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Stop the picture in progress before its next step; nothing happens if there is none."""
        self._cancel.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until nothing is being drawn, or so many seconds."""
        if (thread := self._thread) is not None:
            thread.join(seconds)

    def show(self, drawn: Drawn) -> None:
        """Bring a picture of the history back."""
        self.current = drawn
        self.say(f"Brought back: {drawn.settings.title}. Its settings stand on the left.")

    def save(self, folder: Path | None = None) -> Path:
        """Write the current picture with its settings, whole or not at all, under a new name; returns the file."""
        if self.current is None:
            raise PlaygroundError("There is no picture yet: generate one first.")
        folder = folder or output_folder(self.engine.preset) / "playground"
        settings = self.current.settings
        taken = [int(found[1]) for path in folder.glob("*.png") if (found := re.match(r"(\d+)-", path.name))]
        path = folder / f"{max(taken, default=0) + 1:04d}-{settings.adapter}-seed{settings.seed}.png"
        with atomic_path(path) as temporary:
            temporary.write_bytes(png_with_settings(self.current.picture, self.engine, settings))
        return path

    def _work(self, settings: Settings, cancel: threading.Event) -> None:
        began, self.preview, picture, base = time.monotonic(), None, None, None
        try:
            self.say("Drawing …")
            picture = self.engine.draw(settings, self._stepped, cancel)
            seconds = time.monotonic() - began
            self.preview = picture
            base = self._base(settings, picture, cancel)
            message = f"Drawn in {seconds:.1f} s. {self.engine.remark(settings)}"
        except Cancelled:
            what = f"before the picture was done (step {self.done} of {settings.steps})" if picture is None else ""
            message = f"Cancelled {what or 'while the base model drew the comparison'}."
        except PlaygroundError as error:
            message = str(error)
        except Exception as error:  # out of memory, say: a sentence, and the playground goes on
            message = f"No picture: {type(error).__name__}: {str(error)[:200]}"
        if picture is not None:
            self.current = Drawn(settings, picture, base)
            self.history = [self.current, *self.history][:KEPT]
        self.message, self.preview, self._thread = message.strip(), None, None
        self.on_change()

    def _stepped(self, _step: int, seen: Image.Image | None) -> None:
        self.done += 1
        if seen is not None:
            self.preview = seen
        self.on_change()

    def _base(self, settings: Settings, picture: Image.Image, cancel: threading.Event) -> Image.Image:
        """The base model's picture to compare with, drawn once for each prompt, seed, steps and guidance."""
        key = settings.of_base
        if settings.adapter == "none":
            self._bases[key] = picture
        elif key not in self._bases:
            self._bases[key] = self.engine.draw(key, lambda step, _seen: self._stepped(step, None), cancel)
        while len(self._bases) > 4 * KEPT:
            del self._bases[next(iter(self._bases))]
        return self._bases[key]


# ------------------------------------------------------------------------------------------------------- widgets
WORDS = {
    "a drawing of …": "doodles",
    "a portrait of …, vintage style": "vintage",
    "a drawing of …, vintage style": "mix",
    "a portrait of …": "render",
    "a flat icon of …": "flat",
    "a pencil sketch of …": "sketch",
}
PARTS = {  # field of a scene: (label, names)
    "subject": ("subject", SUBJECTS),
    "color": ("colour", SUBJECT_COLORS[FIRST["subject"]]),
    "headwear": ("headwear", HEADWEAR),
    "headwear_color": ("its colour", WEAR_COLORS),
    "eyewear": ("eyewear", EYEWEAR),
    "background": ("background", BACKGROUNDS),
    "neckwear": ("neckwear", NECKWEAR),
    "neckwear_color": ("its colour", WEAR_COLORS),
    "clothes_color": ("shirt", WEAR_COLORS),
}


class PromptBuilder:
    """Menus for the parts of a portrait. Each choice calls on_text with the whole sentence."""

    def __init__(self, on_text: Callable[[str], None]):
        self.on_text = on_text
        look = {"style": {"description_width": "84px"}, "layout": {"width": "208px", "margin": "1px 2px"}}
        self.words = ipywidgets.Dropdown(options=WORDS, description="words", **look)
        self.words.layout = WIDE
        self.parts = {
            name: ipywidgets.Dropdown(options=names, value=FIRST[name], description=label, **look)
            for name, (label, names) in PARTS.items()
        }
        menus = ipywidgets.HBox(
            list(self.parts.values()), layout={"flex_flow": "row wrap", "width": "436px", "max_width": "100%"}
        )
        self.box = ipywidgets.VBox([self.words, menus], layout={"max_width": "100%"})
        self.parts["subject"].observe(self._subject, names="value")
        for menu in (self.words, *self.parts.values()):
            menu.observe(self._changed, names="value")
        self._changed()

    @property
    def text(self) -> str:
        """The sentence for what is chosen."""
        parts = {name: menu.value for name, menu in self.parts.items()}
        if parts["subject"] in ("man", "woman"):
            parts["hair"] = parts.pop("color")
            parts["color"] = "none"
        return build_prompt(self.words.value, **parts)

    def _subject(self, change: dict) -> None:
        """The colours that this subject comes in; people are told apart by their hair."""
        people, menu = change["new"] in ("man", "woman"), self.parts["color"]
        options = HAIR_COLORS if people else SUBJECT_COLORS[change["new"]]
        menu.description = "hair" if people else "colour"
        if menu.options != options:
            menu.options = options

    def _changed(self, _change: object = None) -> None:
        """A colour can be chosen where there is something to have it and the style's words name colours."""
        plain = self.words.value in COLORLESS_STYLES
        for name in ("headwear", "neckwear"):
            self.parts[f"{name}_color"].disabled = plain or self.parts[name].value == "none"
        self.parts["color"].disabled = plain or self.parts["subject"].value == "skeleton"
        for name in ("clothes_color", "background"):
            self.parts[name].disabled = plain
        self.on_text(self.text)


class Playground:
    """All widgets of the playground, in `box`, around one studio."""

    def __init__(self, studio: Studio):
        self.studio, engine = studio, studio.engine
        self._shown: list[Drawn] = []
        self._class = f"course-{uuid.uuid4().hex[:8]}"  # of this playground's history in the page's style sheet
        self.prompt = ipywidgets.Textarea(
            placeholder="What should the picture show?",
            layout=WIDE | {"height": "76px", "margin": "4px 2px"},
        )
        self.builder = PromptBuilder(self._write)
        self._controls(engine)
        self._picture()
        left = ipywidgets.VBox([*self._left], layout={"width": "440px", "max_width": "100%"})
        right = ipywidgets.VBox([*self._right], layout={"width": f"{SIDE + 8}px", "max_width": "100%"})
        self.box = ipywidgets.HBox([left, right], layout={"flex_flow": "row wrap", "grid_gap": "16px"})
        self.set(engine.default(self.builder.text))
        studio.on_change = self.refresh
        self.generate()  # something to look at, and to compare the next one with

    def _write(self, text: str) -> None:
        self.prompt.value = text

    def _controls(self, engine: Engine) -> None:
        """What is left of the picture: everything that decides what is drawn."""

        def slider(kind: type, name: str, label: str, step: float) -> ipywidgets.Widget:
            low, high = LIMITS[name]
            wide = {"layout": WIDE, "style": {"description_width": "84px"}}
            return kind(min=low, max=high, step=step, description=label, value=low, **wide)

        narrow = {"layout": {"width": "208px"}, "style": {"description_width": "84px"}}
        low, high = LIMITS["seed"]
        self.seed = ipywidgets.BoundedIntText(min=low, max=high, description="seed", **narrow)
        self.new_seed = ipywidgets.Button(description="New seed", icon="random", layout={"width": "110px"})
        self.steps = slider(ipywidgets.IntSlider, "steps", "steps", 1)
        self.guidance = slider(ipywidgets.FloatSlider, "guidance", "guidance", 0.5)
        self.adapter = ipywidgets.ToggleButtons(
            options=engine.choices, style={"button_width": "74px"}, layout={"height": "auto"}
        )
        named = ipywidgets.Label("adapter", layout={"width": "84px", "display": "flex", "justify_content": "flex-end"})
        adapters = ipywidgets.HBox([named, self.adapter], layout={"align_items": "center"})
        self.doodles = slider(ipywidgets.FloatSlider, "doodles", "doodles ×", 0.05)
        self.vintage = slider(ipywidgets.FloatSlider, "vintage", "vintage ×", 0.05)
        self.scale = slider(ipywidgets.FloatSlider, "scale", "scale", 0.05)
        self.start = ipywidgets.Button(description="Generate", button_style="primary", icon="paint-brush")
        self.stop = ipywidgets.Button(description="Cancel", icon="stop", layout={"width": "110px"})
        self.adapter.observe(lambda _change: self._which(), names="value")
        self.new_seed.on_click(lambda _button: setattr(self.seed, "value", secrets.randbelow(10_000)))
        self.start.on_click(lambda _button: self.generate())
        self.stop.on_click(lambda _button: self.studio.cancel())
        self.bar = ipywidgets.IntProgress(min=0, max=1, layout=WIDE | {"height": "10px"})
        self.message = ipywidgets.HTML(layout=WIDE | {"min_height": "44px"})
        self.message.add_class("course-message")
        self._left = [self.builder.box, self.prompt, ipywidgets.HBox([self.seed, self.new_seed]), self.steps]
        self._left += [self.guidance, adapters, self.doodles, self.vintage, self.scale]
        self._left += [ipywidgets.HBox([self.start, self.stop]), self.bar, self.message]

    def _picture(self) -> None:
        """What is right of the controls: the picture, the comparison, the file, and the history."""
        self.image = ipywidgets.Image(format="png", layout={"width": f"{SIDE}px", "max_width": "calc(100% - 4px)"})
        self.image.value = png(Image.new("RGB", (SIDE, SIDE), "#eeeeee"))
        self.share = ipywidgets.FloatSlider(min=0, max=1, step=0.01, value=0.5, readout=False)
        self.share.layout = {"width": f"{SIDE - 190}px"}
        self.share.observe(lambda _change: self._draw(), names="value")
        ends = [ipywidgets.Label(text, layout={"width": "90px"}) for text in ("all adapted", "all base")]
        ends[0].layout.display = ends[1].layout.display = "flex"
        ends[0].layout.justify_content = "flex-end"
        self.compare = ipywidgets.HBox([ends[0], self.share, ends[1]]).add_class("course-compare")
        self.save = ipywidgets.Button(description="Save with settings", icon="download", layout={"width": "180px"})
        self.load = ipywidgets.FileUpload(accept=".png", description="Load settings", layout={"width": "180px"})
        self.save.on_click(lambda _button: self._try(self._save))
        self.load.observe(lambda change: self._try(self._load) if change["new"] else None, names="value")
        self.sheet, self.strip = ipywidgets.HTML(), ipywidgets.HBox(layout={"flex_flow": "row wrap"})
        self.strip.add_class("course-history")
        self.strip_title = ipywidgets.HTML(f"The last {KEPT} pictures. Click one to bring its settings back:")
        files = ipywidgets.HBox([self.save, self.load], layout={"flex_flow": "row wrap"})
        self._right = [self.image, self.compare, files, self.strip_title, self.strip, self.sheet]

    # ---- from the widgets to the studio

    @property
    def settings(self) -> Settings:
        """What the widgets say. Raises PlaygroundError as `Settings`."""
        numbers = {name: getattr(self, name).value for name in LIMITS}
        return Settings(self.prompt.value, adapter=self.adapter.value, **numbers)

    def set(self, settings: Settings) -> None:
        """Let the widgets say these settings; the builder's menus stay, since a sentence need not come from them."""
        for name in ("prompt", "adapter", *LIMITS):
            getattr(self, name).value = getattr(settings, name)
        self._which()

    def generate(self) -> None:
        """Begin a picture of what the widgets say, or say why not."""
        self._try(lambda: self.studio.start(self.settings))

    def bring_back(self, drawn: Drawn) -> None:
        """A picture of the history, and its settings."""
        self.set(drawn.settings)
        self.studio.show(drawn)

    def _try(self, action: Callable[[], None]) -> None:
        """A sentence in place of a traceback, whatever somebody pressed."""
        try:
            action()
        except (PlaygroundError, OSError) as error:
            self.studio.say(str(error))

    def _save(self) -> None:
        self.studio.say(f"Saved as {short(self.studio.save())}.")

    def _load(self) -> None:
        file = self.load.value[0]
        self.load.value = ()
        settings, remark = read_settings(bytes(file["content"]), self.studio.engine)
        self.set(settings)
        self.studio.say(f"Settings of {file['name']} loaded. Generate draws the picture. {remark}".strip())

    # ---- from the studio to the widgets

    def refresh(self) -> None:
        """Show what the studio says. Called from the thread that draws, too."""
        studio = self.studio
        self.bar.max, self.bar.value = studio.total, studio.done if studio.busy else 0
        self.start.disabled, self.stop.disabled = studio.busy, not studio.busy
        self.save.disabled = studio.busy or studio.current is None  # what is shown is what is saved
        self.message.value = escape(studio.message)
        self._draw()
        if self._shown != studio.history:
            self._shown = list(studio.history)
            self._history()

    def _which(self) -> None:
        """Weights are for a mix, and the scale for an adapter."""
        for slider in (self.doodles, self.vintage):
            slider.disabled = self.adapter.value != "mix"
        self.scale.disabled = self.adapter.value == "none"

    def _draw(self) -> None:
        """The picture in progress if there is one, else the current one, left of the boundary the base model's."""
        studio, drawn = self.studio, self.studio.current
        base = drawn.base if drawn and drawn.settings.adapter != "none" and not studio.busy else None
        self.compare.layout.visibility = "visible" if base else "hidden"
        picture = studio.preview if studio.busy else drawn.picture if drawn else None
        if picture is None:
            return
        if base:
            picture = before_after(enlarged(base, SIDE), enlarged(picture, SIDE), self.share.value)
        self.image.value = png(enlarged(picture, SIDE))

    def _history(self) -> None:
        """One button for each picture, with the picture as its face."""
        rules, buttons = [], []
        for number, drawn in enumerate(self._shown):
            name = f"{self._class}-{number}"
            face = base64.b64encode(png(drawn.picture.resize((96, 96), Image.Resampling.LANCZOS))).decode()
            rules.append(f".{name} {{background: center/cover url(data:image/png;base64,{face}) !important}}")
            button = ipywidgets.Button(tooltip=drawn.settings.title, layout={"width": "88px", "height": "88px"})
            button.add_class(name)
            button.on_click(lambda _button, drawn=drawn: self.bring_back(drawn))
            buttons.append(button)
        self.sheet.value = f"<style>{' '.join(rules)}</style>"
        self.strip.children = buttons
