"""The page "Try it" (site/try/): its JavaScript under Node says what the course's Python says.

Whole pictures need onnxruntime-web, which `make site` fetches; without it, or without Node, tests are skipped.
"""

import dataclasses
import io
import json
import random
import shutil
import subprocess

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny import random_adapter

from helpers.base.paths import ROOT
from helpers.course import site
from helpers.diffusion import schedule
from helpers.diffusion.components import load_components
from helpers.diffusion.sampling import ddim_step, inference_timesteps, initial_latents
from helpers.diffusion.text import tokenize
from helpers.lora.lowrank import compose
from helpers.playground.engine import LIMITS, Engine, Settings, build_prompt, read_settings, written_words
from helpers.playground.widgets import PARTS, WORDS
from helpers.presets.variants import get_preset
from helpers.world.captions import vocabulary_corpus
from helpers.world.scenes import HAIR_COLORS, SUBJECT_COLORS

PAGE = ROOT / "site" / "try"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="Node is not installed")


def javascript(code, given=None, imports="", cwd=None):
    """What a few lines of JavaScript return, as JSON; `given` is a value for them, imports: "noise from noise.js"."""
    lines = [f"import {{ {what} }} from {json.dumps((PAGE / file).as_uri())};" for what, file in _pairs(imports)]
    lines += ['import { readFileSync } from "node:fs";', "const given = JSON.parse(readFileSync(0, 'utf8'));"]
    lines += [f"const result = await (async () => {{ {code} }})();", "process.stdout.write(JSON.stringify(result));"]
    command = [NODE, "--input-type=module", "-e", "\n".join(lines)]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def _pairs(imports):
    return [part.split(" from ") for part in imports.split("; ") if part]


# ------------------------------------------------------------------------------------------- the parts of a picture
@pytest.mark.parametrize("size", [16, 40, 1024, 4 * 32 * 32])
def test_the_noise_of_a_seed_is_pytorchs(size):
    seeds = [0, 3, 2**31, 2**32 - 1]
    ours = javascript("return given[0].map((s) => [...noise(s, given[1])])", [seeds, size], "noise from noise.js")
    for seed, row in zip(seeds, ours, strict=True):
        theirs = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        assert (torch.tensor(row) - theirs).abs().max() < 4e-6


def test_the_noise_is_the_notebooks(tiny):
    ours = javascript("return [...noise(7, given)]", int(np.prod(tiny.latent_shape)), "noise from noise.js")
    assert torch.allclose(torch.tensor(ours).view(1, *tiny.latent_shape), initial_latents(tiny, [7]), atol=4e-6)


ODD = [
    *("", " ", "a  b\n\tc", "it's a cat's hat", "don't we'll I'm they've", "A PORTRAIT", "caf\u00e9", "cafe\u0301"),
    *("3d 1024", "!", "wow!", "a! b!!", "<|endoftext|> a <|startoftext|>cat", "\u96ea \u0438 \u0441\u043d\u0435\u0433"),
    *("\U0001f408\u200d\u2b1b cat", 'a_b-c (d) [e] "f"', "xylophone zzz", "a\u00a0b", "\ufb01ne \u0149"),
    *("\u0130stanbul \u039f\u0394\u039f\u03a3", "\ufeffcat", "\u0663 \u00bd \u2167"),
]


@pytest.mark.parametrize("model", ["tiny", "mini"])
def test_the_tokenizer(model, tiny):
    export = pytest.importorskip("helpers.playground.export", reason="onnx is not installed", exc_type=ImportError)
    components = tiny if model == "tiny" else load_components(get_preset("mini"))
    texts = vocabulary_corpus(1000, seed=1) + ODD + ["a cat with " * 30]
    code = "const t = new Tokenizer(given.facts); return given.texts.map((text) => [...t.padded(text)])"
    facts = export.tokenizer_facts(components)
    ours = javascript(code, {"facts": facts, "texts": texts}, "Tokenizer from tokenizer.js")
    with pytest.warns(UserWarning, match="were cut"):
        theirs = tokenize(components, texts).tolist()
    assert {text: ids for text, ids in zip(texts, ours, strict=True)} == dict(zip(texts, theirs, strict=True))


def test_the_schedule():
    settings = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    ours = javascript("return [...alphasCumprod(given)]", settings, "alphasCumprod from sampler.js")
    assert torch.allclose(torch.tensor(ours), schedule.alphas_cumprod(), rtol=2e-5, atol=0)
    for steps in (1, 7, 12, 25, 50, 999):
        timesteps = javascript("return inferenceTimesteps(given, 1000)", steps, "inferenceTimesteps from sampler.js")
        assert timesteps == inference_timesteps(steps)


@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
def test_one_step_of_the_sampler(prediction_type):
    alphas = schedule.alphas_cumprod()
    x, output = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).unbind()
    code = """const [kind, x, output, a, before] = given;
        return [...ddimStep(predicted(kind, Float32Array.from(x), Float32Array.from(output), a), before)]"""
    for t, previous in ((981, 941), (41, 1), (1, -39)):
        given = [prediction_type, *(v[0].tolist() for v in (x, output)), *alphas[[t, max(previous, 0)]].tolist()]
        ours = javascript(code, given, "ddimStep, predicted from sampler.js")
        assert torch.allclose(
            torch.tensor([ours]), ddim_step(prediction_type, x, output, t, previous, alphas), atol=2e-5
        )


def test_an_adapter_and_a_mix_become_what_the_unet_reads(engine, tmp_path):
    export = pytest.importorskip("helpers.playground.export", reason="onnx is not installed", exc_type=ImportError)
    unet = engine.components.unet
    engine.adapters["vintage"] = dict(list(random_adapter(unet, 5, rank=1).items())[:3])  # fewer layers, another rank
    names = export.layer_names(unet, engine.adapters)
    layers = [[name, *reversed(unet.get_submodule(name).weight.shape)] for name in names]
    files = export.write_adapters(engine, tmp_path)
    halves = {
        name: {k: dataclasses.replace(w, A=w.A.half().float(), B=w.B.half().float()) for k, w in adapter.items()}
        for name, adapter in engine.adapters.items()
    }
    code = """const read = (name) => readAdapter(new Uint8Array(readFileSync(given.files[name])).buffer, given.layers);
        const parts = given.parts.map(([name, weight]) => ({ adapter: read(name), weight }));
        const { A, B, rank } = stack(parts, given.layers); return { A: [...A], B: [...B], rank }"""
    for parts in ([], [("doodles", 1.0)], [("vintage", -0.5)], [("doodles", 0.3), ("vintage", 1.5)]):
        given = {"files": {n: str(tmp_path / f) for n, f in files.items()}, "layers": layers, "parts": parts}
        ours = javascript(code, given, "readAdapter, stack from adapters.js")
        A, B = export.flat(compose([(halves[name], weight) for name, weight in parts]), unet, names)
        A_ = torch.tensor(ours["A"], dtype=torch.float32).view(ours["rank"], -1)
        B_ = torch.tensor(ours["B"], dtype=torch.float32).view(-1, ours["rank"])
        for k, (_, columns, rows) in enumerate(layers):  # B A of each layer: a mix may order its ranks as it likes
            a, b = sum(layer[1] for layer in layers[:k]), sum(layer[2] for layer in layers[:k])
            theirs = B[b : b + rows] @ A[:, a : a + columns]
            assert torch.allclose(B_[b : b + rows] @ A_[:, a : a + columns], theirs, atol=1e-5)


def test_numbers_of_every_precision_are_read(tmp_path):
    values = torch.tensor([0.0, -0.0, 1.5, -2.25, 65504, 6e-8, 3e-5, float("inf"), -0.333])
    tensors = {"half": values.half(), "brain": values.bfloat16(), "full": values}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"said": "yes"})
    code = """const { metadata, tensors } = readSafetensors(new Uint8Array(readFileSync(given)).buffer);
        return { ...metadata, ...Object.fromEntries([...tensors].map(([n, t]) => [n, [...t.values].map(String)])) }"""
    found = javascript(code, str(tmp_path / "a.safetensors"), "readSafetensors from adapters.js")
    assert found.pop("said") == "yes"
    for name, numbers in found.items():
        assert torch.equal(torch.tensor([float(x) for x in numbers]), tensors[name].float()), name


# ---------------------------------------------------------------------------------------------- what one presses
def test_the_prompt_builder_writes_the_courses_sentences():
    export = pytest.importorskip("helpers.playground.export", reason="onnx is not installed", exc_type=ImportError)
    rng, styles = random.Random(0), export.world()["styles"]
    asked, expected = [], []
    for k in range(300):
        parts = {name: rng.choice(options) for name, (_, options) in PARTS.items()}
        people = parts["subject"] in ("man", "woman")
        parts["color"] = rng.choice(HAIR_COLORS if people else SUBJECT_COLORS[parts["subject"]])
        asked.append([styles[k % len(styles)], parts])
        hair = {"hair": parts["color"], "color": "none"} if people else {}
        expected.append(build_prompt(styles[k % len(styles)]["style"], **(parts | hair)))
    assert [style["style"] for style in styles] == list(WORDS.values())
    code = "return given.map(([style, parts]) => buildPrompt(style, parts))"
    assert javascript(code, asked, "buildPrompt from prompt.js") == expected


def test_unknown_words_are_the_playgrounds(engine):
    texts = ["a cat with a zeppelin", "Ein Bild!", "a cat \U0001f408", "a red-haired man", *ODD[4:8]]
    known = sorted({word for text in texts for word in written_words(text)} - {"zeppelin", "bild", "\U0001f408"})
    ours = javascript("return given[0].map((t) => newWords(t, given[1]))", [texts, known], "newWords from prompt.js")
    assert ours == [[w for w in dict.fromkeys(written_words(text)) if w not in known] for text in texts]
    assert ours[:3] == [["zeppelin"], ["bild"], ["\U0001f408"]]


FACTS = {"limits": LIMITS | {"scale": (-0.5, 1.5)}, "adapters": {"doodles": "d", "vintage": "v"}}
GIVEN = dataclasses.asdict(Settings("a cat & a dog = 50% #\u00e9", seed=4, adapter="mix", doodles=0.3, scale=-0.25))


def test_a_link_carries_the_settings():
    code = "return fromHash('#' + toHash(given[0]), given[1])"
    defaults = dataclasses.asdict(Settings("another"))
    assert javascript(code, [GIVEN, defaults], "fromHash, toHash from settings.js") == GIVEN
    code = "return [fromHash('', given), fromHash('#seed=9', given), fromHash('#what-you-see', given)]"
    assert javascript(code, defaults, "fromHash from settings.js") == [None, defaults | {"seed": 9}, None]
    code = "return ['#seed=', '#seed=x'].map((hash) => fromHash(hash, given).seed)"
    assert javascript(code, defaults, "fromHash from settings.js") == [None, None], "no number: `complaint` names it"


@pytest.mark.parametrize(
    ("change", "said"),
    [({}, ""), ({"seed": -1}, "seed"), ({"seed": 1.5}, "whole"), ({"steps": 0}, "steps"), ({"steps": None}, "steps"),
     ({"guidance": 99}, "guidance"), ({"scale": 2}, "-0.5 to 1.5"), ({"adapter": "gone"}, "doodles, vintage, mix")],
)  # fmt: skip
def test_wrong_settings_are_named(change, said):
    found = javascript("return complaint(...given)", [GIVEN | change, FACTS], "complaint from settings.js")
    assert found == "" if not said else said in found


def test_the_playground_opens_what_the_page_saves(engine, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "orange").save(buffer, "PNG")
    settings = Settings("a caf\u00e9 \U0001f408", seed=5, adapter="vintage", scale=0.75)
    facts = {"version": 1, "preset": engine.preset.name, "runs": engine.keys, **dataclasses.asdict(settings)}
    code = "return [...withSettings(Uint8Array.from(given[0]), given[1])]"
    saved = bytes(javascript(code, [list(buffer.getvalue()), facts], "withSettings from png.js"))
    assert read_settings(saved, engine) == (settings, "")
    assert Image.open(io.BytesIO(saved)).getpixel((3, 3)) == (255, 165, 0)


# ------------------------------------------------------------------------------------------------- what computes
REAL, PRETENDED, OLD = {"info": {"isFallbackAdapter": False}}, {"info": {"isFallbackAdapter": True}}, {}


@pytest.mark.parametrize(
    ("search", "adapter", "engine"),
    [
        ("", REAL, "webgpu"),
        ("", OLD, "webgpu"),
        ("", PRETENDED, "wasm"),
        ("", {"isFallbackAdapter": True}, "wasm"),
        ("", None, "wasm"),
        ("", "refuses", "wasm"),
        ("", "breaks", "wasm"),
        ("", "no WebGPU", "wasm"),
        ("?engine=wasm", REAL, "wasm"),
        ("?engine=webgpu", None, "webgpu"),
        ("?engine=abacus", REAL, "webgpu"),
    ],
)
def test_a_gpu_computes_where_there_is_a_real_one(search, adapter, engine):
    code = """
        const [search, adapter] = given;
        const ask = () => {
            if (adapter === "breaks") throw new Error("no");
            return adapter === "refuses" ? Promise.reject(new Error("no")) : Promise.resolve(adapter);
        };
        return chosenEngine(search, adapter === "no WebGPU" ? undefined : { requestAdapter: ask });
    """
    assert javascript(code, [search, adapter], "chosenEngine from engine.js") == engine


# In the place of model.js: a GPU that gives up at some point, and what was asked of it
MODEL = """
    export class Cancelled extends Error {}
    export class Model {
      constructor(ort, manifest, read, [engine]) { Object.assign(this, { read, engine }); }
      at(point) { if (this.engine === "webgpu" && globalThis.givesUp === point) throw new Error("the device is lost"); }
      async load() { this.at("load"); }
      async encode() { this.at("encode"); }
      cut() { return ""; }
      async draw(settings, onStep) {
        if (globalThis.givesUp === "file") await this.read("gone");
        await onStep(1, null);
        this.at("draw");
        return this.engine;
      }
    }
"""
WORK = """
    const said = [];
    globalThis.givesUp = given.givesUp;
    globalThis.self = { location: { search: `?engine=${given.engine}` }, postMessage: (data) => said.push(data) };
    globalThis.fetch = async (address) => new Response(readFileSync(new URL(address).pathname));
    await import(given.worker);
    self.onmessage({ data: { draw: 1, jobs: [{ name: "after", settings: {} }] } });
    while (!said.some((data) => data.finished || data.problem)) await new Promise((resolve) => setTimeout(resolve, 5));
    return said.filter((data) => !data.progress);
"""


@pytest.mark.parametrize(
    ("engine", "gives_up", "loaded", "drawn"),
    [
        ("webgpu", "never", ["webgpu"], "webgpu"),
        ("webgpu", "load", ["wasm"], "wasm"),
        ("webgpu", "encode", ["wasm"], "wasm"),
        ("webgpu", "draw", ["webgpu", "wasm"], "wasm"),
        ("wasm", "never", ["wasm"], "wasm"),
        ("webgpu", "file", ["webgpu"], None),
    ],
)
def test_where_the_gpu_gives_up_webassembly_draws(tmp_path, engine, gives_up, loaded, drawn):
    shutil.copy(PAGE / "worker.js", tmp_path / "worker.mjs")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "model.js").write_text(MODEL)
    (tmp_path / "ort").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "ort" / "x.mjs").write_text("export const env = { wasm: {} };")
    (tmp_path / "ort" / "x.wasm").write_text("1234")
    facts = {"module": "x.mjs", "binary": "x.wasm", "bytes": 4}
    (tmp_path / "ort" / "runtime.json").write_text(json.dumps({"version": "1", "wasm": facts, "webgpu": facts}))
    (tmp_path / "model" / "manifest.json").write_text(json.dumps({"files": {"gone": {"bytes": 1, "hash": "x"}}}))
    given = {"worker": (tmp_path / "worker.mjs").as_uri(), "engine": engine, "givesUp": gives_up}
    said = javascript(WORK, given)
    assert [data["engine"] for data in said if data.get("loaded")] == loaded
    assert [data["pixels"] for data in said if data.get("done")] == ([drawn] if drawn else [])
    assert drawn or "model/gone did not arrive" in said[-1]["problem"]


# ------------------------------------------------------------------------------------------------ whole pictures
DRAW = """
    const ort = await import(given.runtime);
    ort.env.wasm.numThreads = 1;
    const file = (name) => new Uint8Array(readFileSync(`${given.folder}/${name}`)).buffer;
    const manifest = JSON.parse(new TextDecoder().decode(file("manifest.json")));
    const model = new Model(ort, manifest, async (name) => file(name));
    await model.load();
    const pictures = [];
    let seen = 0;
    for (const settings of given.settings) {
        pictures.push([...await model.draw(settings, (step, pixels) => { seen += pixels !== null; })]);
    }
    let cancelled = "";
    let steps = 0;
    await model.draw(given.settings[0], () => steps++, () => steps === 2).catch((e) => cancelled = e.constructor.name);
    return { pictures, seen, cancelled, cut: [model.cut("a cat"), model.cut("a cat ".repeat(50))] };
"""


@pytest.mark.parametrize("model", ["tiny", "mini"])
def test_whole_pictures_are_those_of_course_sample(model, request, tmp_path):
    export = pytest.importorskip("helpers.playground.export", reason="onnx is not installed", exc_type=ImportError)
    runtime = site.RUNTIME / "ort.wasm.min.mjs"
    if not runtime.exists():
        pytest.skip("onnxruntime-web is not there: make site fetches it")
    engine = request.getfixturevalue("engine") if model == "tiny" else Engine(get_preset("mini"))
    export.export(engine, tmp_path / "export", Settings("a cat", steps=1))
    asked = [Settings("a drawing of a cat", seed=3, steps=4, guidance=3.0, adapter="doodles", scale=0.75)]
    asked += [Settings("a cat", seed=2**32 - 1, steps=3, guidance=1.0, adapter="mix", doodles=0.5, vintage=1.0)]
    asked += [Settings("", seed=1, steps=3)]
    given = {"runtime": runtime.as_uri(), "folder": str(tmp_path / "export"), "settings": asked}
    given["settings"] = [dataclasses.asdict(settings) for settings in asked]
    found = javascript(DRAW, given, "Model from model.js")
    assert found["seen"] == sum(settings.steps - 1 for settings in asked) and found["cancelled"] == "Cancelled"
    assert found["cut"][0] == "" and "102 tokens, and the model reads the first" in found["cut"][1]
    for settings, pixels in zip(asked, found["pictures"], strict=True):
        side = engine.components.resolution
        ours = np.array(pixels).reshape(side, side, 4)[..., :3]
        difference = np.abs(ours - np.asarray(engine.draw(settings), dtype=float))
        assert difference.mean() < 0.5, settings  # grey levels of 255
