"""The diagrams can be read by everybody, show the model as it is, and are the same each time."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from diagram_checks import SVG, contrast, faults, read, themes

from helpers import diagrams
from helpers.base.paths import ROOT
from helpers.diagrams import canvas, colours, sizes
from helpers.diagrams.canvas import Canvas

NAMES = [name for name in diagrams.__all__ if name != "Picture"]


@pytest.fixture(scope="module")
def drawn() -> dict[str, diagrams.Picture]:
    return {name: getattr(diagrams, name)() for name in NAMES}


def words(picture: diagrams.Picture) -> list[str]:
    return [text.words for text in read(picture.svg).texts]


def numbers(picture: diagrams.Picture) -> set[int]:
    return {int(found.replace(",", "")) for line in words(picture) for found in re.findall(r"\d[\d,]*", line)}


# ------------------------------------------------------------------------------------------------ they can be read
def test_there_are_eight():
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_clipped_small_faint_or_on_top_of_something_else(drawn, name):
    assert faults(drawn[name].svg) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_diagram_says_in_words_what_it_shows(drawn, name):
    root = ElementTree.fromstring(drawn[name].svg)
    said = {node.get("id"): node.text for node in root if node.tag in (f"{SVG}title", f"{SVG}desc")}
    assert root.get("role") == "img" and root.get("aria-labelledby").split() == list(said)
    title, alt = said.values()
    assert title and len(alt) > 100 and alt == drawn[name].alt == repr(drawn[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_diagram_is_as_wide_as_a_page_and_shrinks_on_a_phone(drawn, name):
    root = ElementTree.fromstring(drawn[name].svg)
    assert root.get("width") == "700" and root.get("viewBox") == f"0 0 700 {root.get('height')}"
    assert "max-width:100%" in root.get("style")


def test_diagrams_on_one_page_keep_out_of_each_other(drawn):
    ids = [found for picture in drawn.values() for found in re.findall(r'\bid="([^"]+)"', picture.svg)]
    assert len(set(ids)) == len(ids) == 2 * len(NAMES)
    rules = [rule for picture in drawn.values() for rule in re.findall(r"[{}]([^{}@]+)\{", picture.svg)]
    assert rules and all(rule.startswith(".course-diagram .") for rule in rules)


@pytest.mark.parametrize("name", NAMES)
def test_every_colour_has_a_dark_twin(drawn, name):
    found = themes(drawn[name].svg)
    assert found["light"].keys() == found["dark"].keys()
    for theme, shade in (("light", 0), ("dark", 1)):
        assert found[theme] == {key: colours.COLOURS[key.partition("-")[2]][shade] for key in found[theme]}


# ------------------------------------------------------------------------------------- they show the model as it is
@pytest.fixture(scope="module")
def unet():
    from helpers.minisd.architecture import MINI, build_unet

    with torch.device("meta"):
        return build_unet(MINI)


def test_levels_and_skips_are_the_models(unet):
    levels = sizes.sizes().levels
    side = unet.config.sample_size
    before = unet.config.block_out_channels[-1]
    for number, level in enumerate(levels):
        down, up = unet.down_blocks[number], unet.up_blocks[len(levels) - 1 - number]
        assert level.side == side // 2**number
        assert level.channels == down.resnets[-1].out_channels == up.resnets[-1].out_channels
        assert (level.down_layers, level.up_layers) == (len(down.resnets), len(up.resnets))
        assert level.transformer == bool(getattr(down, "attentions", ())) == bool(getattr(up, "attentions", ()))
    for level in reversed(levels):  # a residual block of the way up reads its own stream and one skip
        up = unet.up_blocks[len(levels) - 1 - levels.index(level)]
        for block, skip in zip(up.resnets, level.skips, strict=True):
            assert block.in_channels == before + skip
            before = block.out_channels


def test_the_labels_of_the_unet(drawn, unet):
    from helpers.minisd.architecture import MINI

    said = words(drawn["unet"])
    latent = f"{MINI.latent_channels} × {unet.config.sample_size} × {unet.config.sample_size}"
    assert f"noisy latents {latent}" in said and f"prediction {latent}" in said
    for side, channels in ((16, MINI.unet[0]), (8, MINI.unet[1]), (4, MINI.unet[2])):
        assert said.count(f"{side} × {side}, {channels} channels") == 2
    assert len(unet.mid_block.resnets) == 2 and len(unet.mid_block.attentions) == 1
    assert f"the prompt, {MINI.text_positions} × {MINI.text_width}, to every transformer block" in said


def test_lora_sits_where_the_training_puts_it(drawn, unet):
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    from helpers.lora import find_targets

    size = sizes.sizes()
    blocks = sum(isinstance(module, Transformer2DModel) for module in unet.modules())
    adapted = find_targets(unet, size.targets)
    assert size.transformer_blocks == blocks
    [line] = [line for line in words(drawn["transformer_block"]) if line.startswith("MiniSD:")]
    assert line.startswith(f"MiniSD: {len(adapted) // blocks} in each block, {len(adapted)} in all.")
    assert f"the {len(find_targets(unet, size.attention)) // blocks} of the attentions" in line
    edges = drawn["transformer_block"].svg.count('class="fill-lora stroke-lora"')
    assert edges == len(adapted) // blocks + 1, "one for each linear layer, and one in the legend"


def test_lora_is_drawn_to_scale(drawn, unet):
    from helpers.presets.sd_configs import build_part

    size = sizes.sizes()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    wide = build_part("sd21-base", "unet").mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    places = [(box[2] - box[0], box[3] - box[1]) for box, fill in read(drawn["lora"].svg).rectangles if "unet" in fill]
    thin = [(box[2] - box[0], box[3] - box[1]) for box, fill in read(drawn["lora"].svg).rectangles if "lora" in fill]
    assert places == [pytest.approx(shape) for shape in (layer.shape, tuple(0.1 * n for n in wide.shape))]
    n, m, r = layer.shape[0], 0.1 * wide.shape[0], size.rank
    assert thin == [pytest.approx(shape) for shape in ((r, n), (n, r), (0.1 * r, m), (m, 0.1 * r))]
    for each in (layer, wide):
        assert {each.numel(), 2 * r * each.shape[0]} <= numbers(drawn["lora"])


OTHER = sizes.Sizes(
    picture=1278,
    latent=(71, 142, 142),
    tokens=77,
    text_width=1021,
    levels=tuple(sizes.levels((51, 103, 207), 11, 142)),
    rank=19,
    alpha=38.0,
    targets=("to_q",),
    attention=("to_q",),
    stable_diffusion_width=1277,
    steps=53,
    guidance=9.0,
)


# Numbers that no size changes, besides the 0 of x_0, the layers' names and the blocks in the middle: values of w on the
# way to the course's, channels that a sheet stands for, and an image's colours.
KEPT = {"guidance": {3, 4}, "unet": {48}, "stable_diffusion": {3}}


@pytest.mark.parametrize("name", NAMES)
def test_no_size_is_typed(name, monkeypatch, drawn):
    monkeypatch.setattr(sys.modules[getattr(diagrams, name).__module__], "sizes", lambda: OTHER, raising=False)
    kept = numbers(drawn[name]) & numbers(getattr(diagrams, name)())
    assert kept <= {0, 1, 2} | KEPT.get(name, set())


# --------------------------------------------------------------------------------------------- they stay the same
@pytest.mark.parametrize("name", NAMES)
def test_drawing_again_gives_the_same_bytes(drawn, name, tmp_path):
    again = getattr(diagrams, name)()
    assert again.svg == again._repr_svg_() == drawn[name].svg
    path = again.save(tmp_path / "a.svg")
    assert path.read_text(encoding="utf-8") == again.svg + "\n"


def test_jupyter_shows_a_diagram(drawn):
    from IPython.core.formatters import DisplayFormatter

    data, _ = DisplayFormatter().format(drawn["lora"])
    assert data["image/svg+xml"] == drawn["lora"].svg and data["text/plain"] == drawn["lora"].alt


def test_the_room_is_light():
    code = "import sys, helpers.diagrams; sys.exit(bool({'torch', 'matplotlib', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------- checks can fail
def sound() -> Canvas:
    page = Canvas("sound", 120)
    page.box(20, 20, 200, 60, "U-Net", "unet", "a note")
    page.arrow((220, 50), (300, 50), (300, 90))
    page.label(320, 54, "words", anchor="start")
    return page


def overlapping(page: Canvas) -> None:
    page.label(330, 58, "more", anchor="start")


def clipped(page: Canvas) -> None:
    page.label(690, 100, "outside")


def across_an_edge(page: Canvas) -> None:
    page.label(220, 100, "words")
    page.rectangle(210, 85, 60, 30, "unet-pale")
    page.shapes.insert(0, page.shapes.pop())


def crossed(page: Canvas) -> None:
    page.line((310, 30), (380, 70))


def covered(page: Canvas) -> None:
    page.rectangle(310, 40, 90, 30, "data-pale")


def faint(page: Canvas) -> None:
    page.label(500, 60, "faint", ink="edge")


def small(page: Canvas) -> None:
    page.shapes.append(
        '<text x="500" y="60" font-size="9" text-anchor="start" class="fill-ink" fill="#1F2328">x</text>'
    )


@pytest.mark.parametrize(
    ("breaking", "complaint"),
    [
        (overlapping, "'words' overlaps 'more'"),
        (clipped, "'outside' leaves the picture"),
        (across_an_edge, "'words' crosses the edge of a box"),
        (crossed, "a line crosses 'words'"),
        (covered, "'words' is painted over"),
        (faint, "'faint' in fill-edge is faint"),
        (small, "has letters of 9 px"),
    ],
)
def test_every_check_can_fail(breaking, complaint):
    page = sound()
    assert faults(page.picture("t", "a").svg) == []
    breaking(page)
    assert any(complaint in fault for fault in faults(page.picture("t", "a").svg))


def test_faint_in_the_dark_alone_is_found(monkeypatch):
    monkeypatch.setitem(canvas.COLOURS, "ink", colours.Colour("#1F2328", "#444444"))
    found = faults(sound().picture("t", "a").svg)
    assert found and all("(dark)" in fault for fault in found)


def test_small_letters_are_refused():
    with pytest.raises(ValueError, match="too small: at least 12"):
        sound().label(10, 10, "x", size=11)


def test_markup():
    page = Canvas("markup", 50)
    page.text(10, 20, "*a*~t~ < {unet:W}, *b*", 20)
    [text] = [node for node in ElementTree.fromstring(page.picture("t", "a").svg) if node.tag == f"{SVG}text"]
    assert "".join(text.itertext()) == "at < W, b"
    shifts = [float(span.get("dy") or 0) for span in text]
    assert sum(shifts) == 0 and max(shifts) > 0, "what follows a subscript rises again"
    assert [span.get("class") for span in text if span.get("class")] == ["fill-unet"]


def test_contrast_is_the_known_one():
    assert contrast("#FFFFFF", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)
