"""The report: every number is looked up, nothing missing or stale gets through, the same sources give the same PDF."""

import json
import re
import shutil
from dataclasses import fields

import pytest
import typst
from PIL import Image

from helpers.course import report
from helpers.course import results as results_module
from helpers.course.report import ReportError, required_figures, required_values
from helpers.presets.variants import get_preset

BAR = "nb07.doodles.bar.style_with_adapter"
SOURCE = report.SOURCE
STYLE = "nb07.doodles.adapter.style_probability"


@pytest.fixture(autouse=True)
def quick_provenance(monkeypatch):
    """Hashing weights and data is other modules' business."""
    monkeypatch.setattr(results_module, "_weights_hash", lambda preset: "weights")
    monkeypatch.setattr(results_module, "_data_hashes", lambda preset: {"doodles": "data"})


def plausible(name):
    """A value of the kind that the notebooks record under this name."""
    if ".bar." in name:
        return "met"
    if name.startswith("nb06") and name.endswith("style_probability"):
        return [0.01, 0.4, 0.9]
    if "step" in name or "rows" in name or name.startswith("lora/"):
        return 250
    return 0.02 if "drop" in name or ".base." in name else 0.913


class Sources:
    """A results.json with every name that the report needs, dummy figures beside it, and where the PDF goes."""

    def __init__(self, folder, preset="mini"):
        self.figures, self.path, self.pdf = folder / "figures", folder / "results.json", folder / "report.pdf"
        note = results_module.current_provenance(get_preset(preset))
        self.data = {"values": {}, "figures": {}, "provenance": {"note": note}}
        facts = report.gather(self.data, get_preset(preset))
        for name in required_values():
            if name not in facts:
                entry = {"value": plausible(name), "interval": [0.0, 0.95], "n": 200, "provenance": "note"}
                entry |= {"encoder": "CLIP ViT-L/14"} if ".encoder." in name else {}
                self.data["values"][name] = entry
        self.figures.mkdir()
        for number, key in enumerate(required_figures()):
            name = f"{key}_dummy"
            Image.new("RGB", (300, 100 + number), "lightgray").save(self.figures / f"{name}.png")
            facts = {"file": f"figures/{name}.png", "alt": f"A gray dummy for {key}.", "model": "MiniSD"}
            self.data["figures"][name] = facts | {"provenance": "note"}

    def compile(self, pdf=None):
        self.path.write_text(json.dumps(self.data))
        return report.compile(self.path, self.figures, pdf or self.pdf).read_bytes()

    def value(self, name, value):
        self.data["values"][name]["value"] = value


@pytest.fixture
def sources(tmp_path):
    return Sources(tmp_path)


def test_compiles_to_the_same_accessible_pdf_twice(sources, tmp_path):
    first = sources.compile()
    assert first.startswith(b"%PDF-") and first == sources.compile(tmp_path / "again.pdf")
    assert b"<pdfuaid:part>1</pdfuaid:part>" in first and b"/StructTreeRoot" in first
    assert b"CreationDate" not in first
    assert first.count(b"/DCTDecode") >= len(required_figures()), "figures as JPEG: as PNG they take 15 MB"
    sources.value(STYLE, 0.937)
    assert sources.compile() != first, "a value must reach the page"


def test_a_plot_is_printed_from_its_vector_file(sources):
    before = sources.compile()
    name = "fig15_dummy"
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="300" height="100"><path d="M0 0L300 100" stroke="red"/></svg>'
    (sources.figures / f"{name}.svg").write_text(svg)
    sources.data["figures"][name]["vector"] = f"figures/{name}.svg"
    after = sources.compile()
    assert after.count(b"/DCTDecode") == before.count(b"/DCTDecode") - 1
    (sources.figures / f"{name}.svg").unlink()
    with pytest.raises(ReportError, match="fig15_dummy.svg is missing"):
        sources.compile()


def test_one_table_says_where_every_figure_comes_from(sources):
    figure = {"notebook": "05_styled_generations", "run": "c3eb", "seed": 0}
    note = {"code": "abc", "weights": "def", "torch": "2"}
    made = {"notebook": "05", "run": "c3eb", "seed": 0, "code": "abc", "weights": "def"}
    assert report.made(figure, note) == made
    assert report.made({"notebook": "01_x"}, {}) == dict.fromkeys(made) | {"notebook": "01"}
    before = sources.compile()
    sources.data["figures"]["fig32_dummy"]["run"] = "another"
    assert sources.compile() != before, "the table has the run of a figure"


def test_intervals_are_widened_for_their_number():
    def facts(m):
        values = {f"nb09.effect.{k}.content.world": {} for k in range(m)} | {"nb09.effect.x.note": {}}
        return report.comparison_facts({"values": values})

    assert facts(0)["effects/widening"] == facts(1)["effects/widening"] == 1.0
    assert facts(72)["effects/count"] == 72
    assert facts(72)["effects/widening"] * 1.959964 == pytest.approx(3.39, abs=0.01)  # z(1 - 0.05 / 144), from tables


def test_the_version_is_the_newest_release(sources):
    assert re.fullmatch(r"\d+\.\d+\.\d+", report.version_facts(sources.data)["version/course"])


def test_figures_count_in_order_and_keep_the_number_of_the_course(sources):
    text = SOURCE.read_text(encoding="utf-8")
    assert "caption: [(fig #str(int(key.slice(3)))) #body" in text and "numbering: _ =>" not in text
    shown = re.findall(r'fig\("(fig\d\d)"', text)
    assert len(shown) == len(set(shown)), "no figure is shown twice"


def test_the_appendix_has_every_setting_and_every_pin(sources):
    facts = report.gather(sources.data, get_preset("mini"))
    names = {f"train/{field.name}" for field in fields(get_preset("mini").train)}
    assert names == {name for name in facts if name.startswith("train/")}
    pins = dict(pin.split(" ") for pin in report.pinned())
    assert {"torch", "diffusers", "peft", "jupyterlab", "nbval"} <= set(pins) and "ruff" not in pins


def test_all_nine_figures_of_the_homework_are_shown():
    assert required_figures()[:9] == [f"fig{number:02d}" for number in range(1, 10)]
    assert {"fig13", "fig15", "fig16", "fig17"} <= set(required_figures())


def test_every_name_is_a_whole_one():
    """A beginning of names, written out in report.typ, would be taken for a value that results.json lacks."""
    assert not [name for name in required_values() if name.endswith((".", "/"))]


def test_names_are_read_from_the_source(tmp_path):
    source = tmp_path / "x.typ"
    source.write_text(
        '#num("nb07.doodles.transfer.0.3.subject") #fig("fig03")[x] "no name" #num("train/rank", digits: 2)'
    )
    assert required_values(source) == ["nb07.doodles.transfer.0.3.subject", "train/rank"]
    assert required_figures(source) == ["fig03"]


@pytest.mark.parametrize("name", [STYLE, "doodles/epochs", "nb06.vintage.step_above_half"])
def test_a_missing_value_is_named(sources, name):
    del sources.data["values"][name]
    with pytest.raises(ReportError, match=re.escape(repr(name))):
        sources.compile()
    assert not sources.pdf.exists()


def test_the_lookup_itself_stops_at_a_missing_value(sources, monkeypatch):
    monkeypatch.setattr(report, "check_complete", lambda values, names: None)
    del sources.data["values"][STYLE]
    with pytest.raises(ReportError, match=rf"lacks '{re.escape(STYLE)}'.*report\.typ:\d+"):
        sources.compile()


def test_a_missing_interval_is_named(sources):
    del sources.data["values"][STYLE]["interval"]
    with pytest.raises(ReportError, match=rf"'{re.escape(STYLE)}' has no interval"):
        sources.compile()


@pytest.mark.parametrize("key", ["code", "weights", "data", "model"])
def test_a_stale_value_is_named(sources, key):
    note = sources.data["provenance"]["note"]
    sources.data["provenance"]["old"] = note | {key: "other"}
    sources.data["values"][STYLE]["provenance"] = "old"
    with pytest.raises(ReportError, match=rf"stale: '{re.escape(STYLE)}' \(other {key} than"):
        sources.compile()


def test_a_stale_figure_and_a_value_without_provenance_are_named(sources):
    sources.data["provenance"]["old"] = sources.data["provenance"]["note"] | {"code": "other"}
    sources.data["figures"]["fig06_dummy"]["provenance"] = "old"
    with pytest.raises(ReportError, match="'fig06_dummy'"):
        sources.compile()
    sources.data["figures"]["fig06_dummy"]["provenance"] = "note"
    del sources.data["values"][STYLE]["provenance"]
    with pytest.raises(ReportError, match=re.escape(STYLE)):
        sources.compile()


def test_another_machine_or_library_is_not_stale(sources):
    sources.data["provenance"]["note"] |= {"torch": "9.9", "device": "another"}
    assert sources.compile()


def test_values_of_two_presets_are_refused(sources):
    sources.data["provenance"]["old"] = sources.data["provenance"]["note"] | {"preset": "smoke"}
    with pytest.raises(ReportError, match="mini, smoke"):
        sources.compile()


def test_a_missing_figure_is_named_and_the_old_pdf_stays(sources):
    before = sources.compile()
    (sources.figures / "fig06_dummy.png").unlink()
    with pytest.raises(ReportError, match="fig06_dummy.png is missing"):
        sources.compile()
    del sources.data["figures"]["fig06_dummy"]
    with pytest.raises(ReportError, match="fig06"):
        sources.compile()
    assert sources.pdf.read_bytes() == before


@pytest.mark.parametrize("fact", ["alt", "model"])
def test_a_figure_needs_its_alt_text_and_its_model(sources, fact):
    sources.data["figures"]["fig08_dummy"][fact] = " "
    with pytest.raises(ReportError, match=f"fig08_dummy.*no {fact}"):
        sources.compile()


def test_settings_cannot_be_recorded_over(sources):
    sources.data["values"]["train/rank"] = sources.data["values"][STYLE]
    with pytest.raises(ReportError, match="'train/rank'"):
        sources.compile()


def test_every_outcome_makes_a_report(sources):
    for name in sources.data["values"]:
        if ".bar." in name:
            sources.value(name, "not met")
        elif name.endswith("step_above_half"):
            sources.value(name, -1)
        elif "drop" in name or ".base.style" in name:
            sources.value(name, 0.3)
        elif ".adapter.style" in name:
            sources.value(name, 0.1)
        elif name.endswith("loss_last"):
            sources.value(name, 2.0)
    assert sources.compile()


def test_a_verdict_that_contradicts_its_number_is_refused(sources):
    sources.value(BAR, "not met")
    with pytest.raises(ReportError, match=re.escape(BAR)):
        sources.compile()


def test_smoke_says_that_it_is_a_smoke_test(tmp_path, monkeypatch):
    smoke = Sources(tmp_path, "smoke")
    with_notice = smoke.compile()
    assert 'value("preset/name") == "smoke"' in (text := report.SOURCE.read_text(encoding="utf-8"))
    monkeypatch.setattr(report, "SOURCE", tmp_path / "report.typ")
    (tmp_path / "report.typ").write_text(text.replace('== "smoke"', '== "no preset"'), encoding="utf-8")
    shutil.copy(SOURCE.parent / report.BIBLIOGRAPHY, tmp_path)
    assert smoke.compile() != with_notice


def test_stable_diffusion_needs_no_judge(tmp_path):
    """Of its pictures the notebooks measure what an encoder says; the sentences about the rest are left out."""
    sources = Sources(tmp_path, "sd21")
    sources.data["values"] = {
        name: entry
        for name, entry in sources.data["values"].items()
        if ".encoder." in name or (not name.startswith(("nb0", "parts/")) and "held_out" not in name)
    }
    del sources.data["values"]["nb07.doodles.encoder.adapter.copies"]  # none of the 1,000 is held out
    del sources.data["figures"]["fig16_dummy"]
    assert sources.compile()
    del sources.data["figures"]["fig06_dummy"]
    with pytest.raises(ReportError, match="fig06"):
        sources.compile()


def test_numbers_are_printed_rounded(sources, tmp_path):
    sources.compile()
    layout = report.SOURCE.read_text(encoding="utf-8").split("// --- layout")[0]
    calls = ["fixed(0.9149, 2)", "fixed(-0.004, 2)", "fixed(-2.06, 1)", "fixed(7, 0)", "fixed(0.001, none)"]
    calls += ['grouped("1234567")', 'grouped("250")', "fixed(0.05, 3)"]
    source = tmp_path / "numbers.typ"
    source.write_text(f"{layout}\n#metadata(({', '.join(calls)})) <out>", encoding="utf-8")
    values = report.gather(sources.data, get_preset("mini"))
    (tmp_path / "data.json").write_text(json.dumps({"values": values, "figures": {}}))
    [printed] = json.loads(typst.query(str(source), "<out>", field="value", root=str(tmp_path)))
    assert printed == ["0.91", "0.00", "−2.1", "7", "0.001", "1,234,567", "250", "0.050"]


# ------------------------------------------------------------------------------------------------------ the source
def prose(text):
    """What report.typ says below its layout, without the places where a digit is no measured number."""
    text = text.split("// --- text\n")[1]
    text = re.sub(r'"(nb\d\d\.[^"\s]+|[a-z_]+/[^"\s]+|fig\d\d|references\.bib)"', "NAME", text)  # what is looked up
    text = re.sub(r"digits: \d\b", "", text)  # how many digits of it are printed
    text = re.sub(r"@\w+", "REF", text)  # figures, sections, papers
    text = re.sub(r"Stable Diffusion \d(\.\d)?(-base)?", "MODEL", text)
    text = re.sub(r"\$[^$]*\$", lambda formula: re.sub(r"(?<!\d)[012](?![\d.])", "", formula[0]), text)
    return text


def test_no_number_is_typed_in_the_prose():
    lines = prose(report.SOURCE.read_text(encoding="utf-8")).splitlines()
    found = [line.strip() for line in lines if re.search(r"\d", line)]
    assert not found, "numbers come from results.json: " + "; ".join(found)


@pytest.mark.parametrize("typed", ["reaches 0.93", "over 200 pictures", "*95%* of them", "$p = 0.9$", "$n = 20$"])
def test_a_typed_number_would_be_found(typed):
    assert re.search(r"\d", prose(f"// --- text\nThe adapter {typed}."))


def test_citations_and_bibliography_agree():
    text = report.SOURCE.read_text(encoding="utf-8")
    known = set(re.findall(r"^@\w+\{(\w+),", (report.SOURCE.parent / report.BIBLIOGRAPHY).read_text(), re.MULTILINE))
    labels = set(re.findall(r"<([\w-]+)>", text)) | set(required_figures())
    assert set(re.findall(r"(?<![\w#])@(\w+)", text)) - labels == known


def test_the_report_is_compiled_from_these_files(sources, tmp_path, monkeypatch):
    """A sentence added to report.typ changes the PDF; a mistake in it is an error with its line."""
    before = sources.compile()
    copy = tmp_path / "report"
    shutil.copytree(report.SOURCE.parent, copy, ignore=shutil.ignore_patterns("*.pdf", "*.json"))
    monkeypatch.setattr(report, "SOURCE", copy / "report.typ")
    with (copy / "report.typ").open("a", encoding="utf-8") as file:
        file.write("\nOne more sentence.\n")
    assert sources.compile() != before
    with (copy / "report.typ").open("a", encoding="utf-8") as file:
        file.write("\n#nonsense()\n")
    with pytest.raises(ReportError, match=r"nonsense.*report\.typ:\d+"):
        sources.compile()
