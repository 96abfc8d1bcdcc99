"""The playground: the same pictures as `generate`, and nothing that a person presses or types ends in a traceback."""

import dataclasses
import datetime
import io
import json
import threading

import pytest
import torch
from PIL import Image, PngImagePlugin
from tiny import random_adapter

from helpers import lora
from helpers.course.results import output_folder
from helpers.diffusion.components import load_components
from helpers.diffusion.sampling import generate
from helpers.evaluation.measures import adapted
from helpers.lora.lowrank import attach, compose, weights_of
from helpers.playground import engine as playground
from helpers.playground import widgets
from helpers.playground.engine import (
    CHUNK,
    FIRST,
    Cancelled,
    Engine,
    PlaygroundError,
    Settings,
    before_after,
    build_prompt,
    enlarged,
    png_with_settings,
    predicted_picture,
    read_settings,
)
from helpers.playground.widgets import KEPT, WORDS, Playground, PromptBuilder, Studio
from helpers.presets.variants import get_preset
from helpers.training.runs import find_run, run_key

SETTINGS = Settings("a drawing of a cat", seed=3, steps=4, guidance=3.0)


@pytest.fixture
def studio(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    return Studio(engine)


def change(**settings):
    return dataclasses.replace(SETTINGS, **settings)


def pixels(picture):
    return picture.size, picture.tobytes()


def drawn(studio, settings):
    studio.start(settings)
    studio.wait(60)
    return studio.current


def expected(engine, settings, parts):
    """What `generate` makes of these settings with an adapter attached by hand."""
    if parts:
        attach(engine.components.unet, parts)
    try:
        numbers = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
        if not parts:
            return generate(engine.components, [settings.prompt], [settings.seed], **numbers)[0]
        with lora.scaled(engine.components.unet, settings.scale):
            return generate(engine.components, [settings.prompt], [settings.seed], **numbers)[0]
    finally:
        lora.remove(engine.components.unet)


# ------------------------------------------------------------------------------------------------------ pictures
def test_a_picture_is_that_of_generate_bit_for_bit(engine):
    state = torch.get_rng_state()
    parts = engine.adapters
    mix = compose([(parts["doodles"], 0.4), (parts["vintage"], 0.9)])
    cases = [
        (SETTINGS, {}),
        (change(adapter="doodles"), parts["doodles"]),
        (change(adapter="vintage", scale=0.5), parts["vintage"]),
        (change(adapter="mix", doodles=0.4, vintage=0.9, scale=-0.5), mix),
    ]
    seen = set()
    for settings, weights in cases:
        picture = engine.draw(settings)
        assert pixels(picture) == pixels(expected(engine, settings, weights)) == pixels(engine.draw(settings))
        seen.add(pixels(picture))
    assert len(seen) == len(cases)
    assert torch.equal(state, torch.get_rng_state())
    assert not lora.lora_layers(engine.components.unet)


def test_watching_changes_nothing_and_shows_ever_less_noise(engine):
    steps, looks = [], []

    def watch(step, seen):
        steps.append(step)
        looks.append(seen)

    settings = change(steps=20)
    assert pixels(engine.draw(settings, watch)) == pixels(engine.draw(settings))
    assert steps == list(range(1, 21))
    assert 4 <= sum(seen is not None for seen in looks) <= playground.PREVIEWS and looks[-1] is None


def test_the_prediction_is_solved_from_two_latents(tiny):
    alphas_cumprod = tiny.noise_scheduler.alphas_cumprod
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=g)
    for t, previous in ((981, 961), (501, 481), (1, -19)):
        at = [alphas_cumprod[k].sqrt() * x0 + (1 - alphas_cumprod[k]).sqrt() * noise for k in (t, max(previous, 0))]
        assert torch.allclose(predicted_picture(*at, t, previous, alphas_cumprod), x0, atol=1e-3)


def test_the_studio_draws_the_base_once_for_each_noise(studio):
    first = drawn(studio, change(adapter="doodles"))
    assert studio.total == studio.done == 8 and studio.message.startswith("Drawn in ")
    assert pixels(first.base) == pixels(studio.engine.draw(SETTINGS))
    second = drawn(studio, change(adapter="doodles", scale=0.5))
    assert studio.total == studio.done == 4 and second.base is first.base
    assert pixels(second.picture) != pixels(first.picture)
    base = drawn(studio, change(seed=4))
    assert base.base is base.picture and studio.total == 4


# --------------------------------------------------------------------------------------------------- cancelling
def test_cancelling_stops_before_the_next_step_and_leaves_the_model_alone(engine):
    cancel, steps = threading.Event(), []

    def watch(step, _seen):
        steps.append(step)
        cancel.set()

    before = {name: p.clone() for name, p in engine.components.unet.state_dict().items()}
    with pytest.raises(Cancelled):
        engine.draw(change(adapter="mix"), watch, cancel)
    assert steps == [1]
    after = engine.components.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def held(studio):
    """Let the picture in progress wait after its first step; returns the events (reached, go on)."""
    reached, go = threading.Event(), threading.Event()

    def change():
        if studio.busy and studio.done == 1:
            reached.set()
            go.wait(60)

    studio.on_change = change
    return reached, go


def test_a_cancelled_studio_goes_on(studio):
    reached, go = held(studio)
    studio.start(change(adapter="doodles"))
    assert reached.wait(60) and studio.busy
    with pytest.raises(PlaygroundError, match="One picture at a time"):
        studio.start(SETTINGS)
    studio.cancel()
    go.set()
    studio.wait(60)
    assert not studio.busy and studio.current is None and studio.history == []
    assert studio.message == "Cancelled before the picture was done (step 1 of 4)."
    studio.cancel()  # of nothing
    assert pixels(drawn(studio, SETTINGS).picture) == pixels(studio.engine.draw(SETTINGS))


def test_cancelling_the_comparison_keeps_the_picture(studio):
    def change_of_mind():
        if studio.done == 4:
            studio.cancel()

    studio.on_change = change_of_mind
    picture = drawn(studio, change(adapter="doodles"))
    assert picture.base is None and studio.history == [picture]
    assert studio.message == "Cancelled while the base model drew the comparison."


def test_an_error_while_drawing_is_a_sentence(studio, monkeypatch):
    def broken(*_args, **_settings):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(playground, "generate", broken)
    assert drawn(studio, change(adapter="doodles")) is None and not studio.busy
    assert studio.message == "No picture: RuntimeError: out of memory"
    assert not lora.lora_layers(studio.engine.components.unet)


# --------------------------------------------------------------------------------------------------- bad prompts
@pytest.mark.parametrize(
    "text, remark",
    [
        ("", "Without words"),
        (" \n\t", "Without words"),
        ("🦄 on 🏝️", "In no caption that the model was trained on: 🦄, 🏝"),
        ("an astronaut riding a cat", "In no caption that the model was trained on: astronaut, riding."),
        ("a drawing of a red-haired woman, vintage style", "Drawn in "),
        ("\x00", "Drawn in "),
    ],
)
def test_odd_prompts_give_a_picture_and_a_remark(studio, text, remark):
    assert drawn(studio, change(prompt=text)) is not None and remark in studio.message


@pytest.mark.parametrize("text, said", [("x" * 5000, "5,000 characters"), ("a cat " * 60, "tokens, and the model")])
def test_prompts_that_are_too_long_are_refused_in_a_sentence(studio, text, said):
    with pytest.raises(PlaygroundError, match=said):
        studio.start(change(prompt=text))
    assert not studio.busy


def test_a_style_without_a_run_is_not_offered(tiny):
    engine = Engine(get_preset("smoke"), tiny, {"vintage": random_adapter(tiny.unet, 0)})
    assert engine.choices == ("none", "vintage") and engine.default().adapter == "none"
    for name in ("doodles", "mix"):
        with pytest.raises(PlaygroundError, match="no finished run of doodles"):
            engine.draw(change(adapter=name))


# ---------------------------------------------------------------------------------------------------------- files
def with_text(text, name=CHUNK):
    """A PNG file that has a text under the name."""
    chunk, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    chunk.add_text(name, text)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=chunk)
    return buffer.getvalue()


@pytest.mark.parametrize("text", ["a drawing of a cat", "", '“Zoë” draws 🦄 \\ " \n 猫'])
def test_settings_survive_a_file(engine, text):
    settings = change(prompt=text, adapter="mix", doodles=0.35, vintage=1.5, scale=-0.5, seed=2**32 - 1)
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    data = png_with_settings(picture, engine, settings)
    assert read_settings(data, engine) == (settings, "")
    with Image.open(io.BytesIO(data)) as read:
        assert pixels(read) == pixels(picture) and json.loads(read.info[CHUNK])["version"] == playground.VERSION
    assert b"tEXt" + CHUNK.encode() in data


def test_saving_writes_new_files_and_all_or_nothing(studio, tmp_path, monkeypatch):
    with pytest.raises(PlaygroundError, match="no picture yet"):
        studio.save()
    picture = drawn(studio, change(adapter="doodles"))
    first, second = studio.save(), studio.save()
    assert [path.name for path in (first, second)] == ["0001-doodles-seed3.png", "0002-doodles-seed3.png"]
    assert read_settings(first.read_bytes(), studio.engine) == (picture.settings, "")

    def broken(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("helpers.playground.widgets.png_with_settings", broken)
    with pytest.raises(OSError, match="disk full"):
        studio.save()
    assert sorted(first.parent.iterdir()) == [first, second]


def test_a_file_of_other_runs_is_read_with_a_remark(engine):
    data = png_with_settings(Image.new("RGB", (8, 8)), engine, change(adapter="mix"))
    engine.keys = {"doodles": "another", "vintage": "third"}
    assert read_settings(data, engine)[1].startswith("Your doodles and vintage adapter is from another run")


def facts(**changed):
    base = {"version": 1, "preset": "smoke", "runs": {}, **dataclasses.asdict(SETTINGS)} | changed
    return with_text(json.dumps({name: value for name, value in base.items() if value != "left out"}))


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "not a PNG picture"),
        (b"GIF89a nothing", "not a PNG picture"),
        (facts()[:60], "not a PNG picture"),
        (with_text("x", "Comment"), "carries no settings"),
        (with_text("{"), "not JSON"),
        (with_text("[1]"), "version None"),
        (with_text("{}"), "version None"),
        (facts(version=2), "version 2"),
        (facts(version=True), "version True"),
        (facts(seed="left out"), "lack seed"),
        (facts(colour="red"), "unknown 'colour'"),
        (facts(preset="sd21"), "of the preset 'sd21'"),
        (facts(runs=3), "runs should be named"),
        (facts(seed=10**400), "seed should be a whole number"),
        (with_text("[" * 100_000), "not JSON"),
        (facts(prompt="\ud800"), "half of an emoji"),
        (facts(prompt=3), "prompt should be text"),
        (facts(prompt="x" * 5000), "5,000 characters"),
        (facts(adapter="oil"), "adapter should be one of none, doodles"),
        (facts(adapter=["none"]), "adapter should be one of none, doodles"),
        (facts(seed=-1), "seed should be a whole number from 0 to 4294967295"),
        (facts(seed=1.5), "seed should be a whole number"),
        (facts(steps=0), "steps should be a whole number from 1 to 50"),
        (facts(steps=True), "steps should be a whole number"),
        (facts(guidance="4"), "guidance should be a number from 1 to 15"),
        (facts(scale=float("nan")), "scale should be a number from -1 to 2"),
        (facts(doodles=None), "doodles should be a number"),
        (facts(vintage=9), "vintage should be a number"),
        (b"\0" * (playground.MAX_FILE + 1), "20 MB"),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(engine, data, said):
    with pytest.raises(PlaygroundError, match=said) as caught:
        read_settings(data, engine)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


# ------------------------------------------------------------------------------------------------- before and after
def test_the_boundary_moves():
    red, blue = Image.new("RGB", (128, 4), "red"), Image.new("RGB", (128, 4), "blue")
    assert pixels(before_after(red, blue, 1)) == pixels(red) and pixels(before_after(red, blue, 0)) == pixels(blue)
    row = [before_after(red, blue, 0.25).getpixel((x, 2)) for x in (31, 32, 33)]
    assert row == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    for share, other in ((1.5, blue), (0.5, Image.new("RGB", (4, 4)))):
        with pytest.raises(ValueError):
            before_after(red, other, share)


@pytest.mark.parametrize("width, wanted", [(64, 384), (512, 512), (100, 400)])
def test_small_pictures_are_enlarged_by_whole_factors(width, wanted):
    assert enlarged(Image.new("RGB", (width, width))).size == (wanted, wanted)


# -------------------------------------------------------------------------------------------------------- builder
def test_the_builder_writes_the_worlds_sentences():
    assert build_prompt("vintage", **FIRST) == (
        "a portrait of a white rabbit with a blue beanie and a red scarf, wearing a green shirt, "
        "on a yellow background, vintage style"
    )
    assert build_prompt("sketch", **FIRST) == "a pencil sketch of a rabbit with a beanie and a scarf"
    assert build_prompt("mix", **FIRST).startswith("a drawing of") and build_prompt("mix", **FIRST).endswith(" style")


def test_every_menu_changes_the_sentence():
    texts = []
    builder = PromptBuilder(texts.append)
    for name, value in {"subject": "woman", "color": "red", "headwear": "none", "eyewear": "sunglasses"}.items():
        builder.parts[name].value = value
    assert texts[-1].startswith("a drawing of a woman with red hair, sunglasses and a red scarf, wearing a green")
    assert builder.parts["headwear_color"].disabled and builder.parts["color"].description == "hair"
    builder.parts["subject"].value = "skeleton"
    assert builder.parts["color"].disabled and "a drawing of a skeleton with sunglasses" in builder.text
    for words in WORDS.values():
        for subject in builder.parts["subject"].options:
            builder.words.value, builder.parts["subject"].value = words, subject
            assert subject in builder.text and "none" not in builder.text


# -------------------------------------------------------------------------------------------------------- widgets
@pytest.fixture
def minisd(monkeypatch, tmp_path):
    """MiniSD itself, whose prompts may be as long as the builder's, with random adapters."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    components = load_components(get_preset("smoke"))
    return Engine(
        get_preset("smoke"), components, {name: random_adapter(components.unet, 0) for name in playground.STYLES}
    )


@pytest.fixture
def ui(minisd):
    box = Playground(Studio(minisd))
    box.studio.wait(60)
    box.steps.value = 2
    return box


def press(ui, button):
    button.click()
    ui.studio.wait(60)


def test_it_opens_with_a_picture_and_the_history_brings_settings_back(ui):
    assert ui.studio.current is not None and ui.stop.disabled and not ui.start.disabled
    for seed in range(KEPT + 2):
        ui.seed.value, ui.scale.value = seed, 0.1 * seed
        press(ui, ui.start)
    assert len(ui.strip.children) == len(ui.studio.history) == KEPT
    assert [one.settings.seed for one in ui.studio.history] == list(range(KEPT + 1, 1, -1))
    now = ui.image.value
    ui.prompt.value = "something else"
    ui.strip.children[-1].click()
    assert ui.seed.value == 2 and ui.prompt.value == ui.builder.text and ui.scale.value == pytest.approx(0.2)
    assert ui.image.value != now and "Brought back" in ui.message.value
    assert len(ui.strip.children) == KEPT


def test_the_comparison_follows_its_slider(ui):
    press(ui, ui.start)
    assert ui.compare.layout.visibility == "visible"
    middle = ui.image.value
    ui.share.value = 0.0
    assert ui.image.value != middle
    ui.adapter.value = "none"
    press(ui, ui.start)
    assert ui.compare.layout.visibility == "hidden" and ui.scale.disabled


def test_bad_input_is_told_below_the_buttons(ui):
    ui.prompt.value = "<b>" + "x" * 5000
    press(ui, ui.start)
    assert "5,003 characters" in ui.message.value
    ui.prompt.value = "<b>cat</b>"
    press(ui, ui.start)
    assert "<b>" not in ui.message.value and ui.studio.current.settings.prompt == "<b>cat</b>"


def test_saving_and_loading_through_the_buttons(ui):
    press(ui, ui.save)
    path = next((output_folder("smoke") / "playground").glob("*.png"))
    assert "Saved as" in ui.message.value
    wanted = ui.studio.current.settings
    ui.prompt.value, ui.seed.value, ui.adapter.value = "other", 99, "none"
    upload(ui, path.name, path.read_bytes())
    assert ui.settings == wanted and "loaded" in ui.message.value and ui.load.value == ()
    upload(ui, "bad.png", b"nothing")
    assert ui.settings == wanted and "not a PNG picture" in ui.message.value


def upload(ui, name, data):
    facts = {"name": name, "type": "image/png", "size": len(data), "content": memoryview(data)}
    facts["last_modified"] = datetime.datetime(2026, 1, 1)
    ui.load.set_trait("value", (facts,))


def test_headlessly_it_is_a_figure(minisd, monkeypatch):
    shown = []
    monkeypatch.setenv("COURSE_HEADLESS", "1")
    monkeypatch.setattr(widgets, "Engine", lambda _preset: minisd)
    monkeypatch.setattr(widgets, "show", lambda fig, alt: shown.append(alt))
    widgets.play("smoke")
    assert len(shown) == 1 and "doodles, vintage, mix" in shown[0]


def test_in_jupyter_it_is_the_widgets(minisd, monkeypatch):
    shown = []
    monkeypatch.delenv("COURSE_HEADLESS", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "playground.ipynb")
    monkeypatch.setattr(widgets, "Engine", lambda _preset: minisd)
    monkeypatch.setattr(widgets, "display", shown.append)
    widgets.play("smoke")
    assert len(shown) == 1 and widgets.is_live()


# ----------------------------------------------------------------------------------------- the repository's own runs
def test_minisd_with_its_finished_runs_draws_what_the_chapters_draw():
    engine = Engine(get_preset("mini"))
    assert engine.choices == playground.ADAPTERS and set(engine.keys) == set(playground.STYLES)
    settings = dataclasses.replace(engine.default(build_prompt("doodles", **FIRST)), seed=5, steps=4)
    run = find_run(engine.preset, "doodles", run_key(engine.preset, "doodles"))
    with adapted(engine.components, run.adapter) as unet:
        assert weights_of(unet).keys() == engine.adapters["doodles"].keys()
        wanted = generate(engine.components, [settings.prompt], [5], num_inference_steps=4, guidance_scale=4.0)[0]
    assert pixels(engine.draw(settings)) == pixels(wanted)
    longest = {"subject": "man", "hair": "orange", "headwear": "cowboy hat", "headwear_color": "orange"}
    longest |= {"eyewear": "sunglasses", "neckwear": "bow tie", "neckwear_color": "orange", "background": "orange"}
    engine.check(Settings(build_prompt("mix", **(FIRST | longest))))
