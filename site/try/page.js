// The page: controls on one side, a worker that draws on the other, two pictures between them.

import { chosenEngine } from "./engine.js";
import { Form } from "./form.js";
import { withSettings } from "./png.js";
import { complaint, fromHash, ofBase, title, toHash } from "./settings.js";

const element = (id) => document.getElementById(`try-${id}`);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const say = (text) => (element("status").textContent = text);
const json = async (name) => (await fetch(new URL(name, import.meta.url), { cache: "no-cache" })).json();
const WAIT = 150; // milliseconds that a slider rests before the picture is drawn again

class Page {
  constructor(manifest, runtimes, engine) {
    Object.assign(this, { manifest, runtimes, engine, worker: null, threads: 0, request: 0 });
    this.arrived = new Map(); // files and their bytes
    [this.drawn, this.shown] = [{}, {}]; // the settings of both pictures: as a link, if finished; as an object
    this.form = new Form(manifest, () => this.soon());
    element("form").addEventListener("submit", (event) => (event.preventDefault(), this.draw()));
    element("another").addEventListener("click", () => this.another());
    element("cancel").addEventListener("click", () => this.cancel());
    element("save").addEventListener("click", () => this.save());
    element("link").addEventListener("click", () => this.copyLink());
    window.addEventListener("hashchange", () => this.open());
    this.open();
    this.sayLoaded();
  }

  /** The settings of the address, or those of the pictures that are there before anything is loaded. */
  open() {
    const { first } = this.manifest;
    const given = fromHash(location.hash, first);
    const wrong = given ? complaint(given, this.manifest) : "";
    const settings = given && !wrong ? given : first;
    this.form.set(settings);
    const same = toHash(settings) === toHash(first) && !this.worker;
    if (same) element("after-title").textContent = title(first);
    for (const image of document.querySelectorAll("#try figure img")) image.hidden = !same;
    if (wrong) say(`The link asks for something else than this page has. ${wrong}`);
    else if (same) say(`Drawn beforehand by ${this.manifest.model}, seed ${first.seed}. Press Draw to draw yourself.`);
    else say("The settings are those of the link. Press Draw.");
  }

  soon() {
    if (!this.worker) return; // nothing is loaded before somebody asks for a picture
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.draw(), WAIT);
  }

  another() {
    const [low, high] = this.manifest.limits.seed;
    element("seed").value = low + Math.floor(Math.random() * Math.min(high, 1e6));
    this.draw();
  }

  /** Draws what the controls say: with the adapter, and without it unless that picture is there already. */
  draw() {
    clearTimeout(this.timer);
    const settings = this.form.settings;
    const wrong = complaint(settings, this.manifest);
    if (wrong) return say(wrong);
    history.replaceState(null, "", `#${toHash(settings)}`);
    const jobs = { before: ofBase(settings), after: settings };
    if (settings.adapter === "none") delete jobs.after;
    else if (toHash(jobs.before) === this.drawn.before) delete jobs.before;
    element("after").closest("figure").hidden = settings.adapter === "none";
    this.start(Object.entries(jobs).map(([name, job]) => ({ name, settings: job })).reverse());
  }

  start(jobs) {
    this.jobs = Object.fromEntries(jobs.map(({ name, settings }) => [name, settings]));
    this.total = jobs.reduce((sum, { settings }) => sum + settings.steps, 0);
    this.steps = 0;
    this.began = performance.now();
    if (!this.worker) {
      this.worker = new Worker(new URL(`worker.js?engine=${this.engine}`, import.meta.url), { type: "module" });
      this.worker.onmessage = ({ data }) => this.hear(data);
      this.worker.onerror = () => this.fail("The part of the page that draws did not start. Load the page again.");
    }
    say(this.threads ? `Step 0 of ${this.total} …` : "Loading …");
    element("cancel").disabled = false;
    this.worker.postMessage({ draw: ++this.request, jobs });
  }

  cancel() {
    if (this.threads) this.worker.postMessage({ cancel: true });
    else this.fail("Cancelled."); // before all was loaded
  }

  hear(data) {
    if (data.progress) return this.arriving(data.progress);
    if (data.loaded) return Object.assign(this, { threads: data.threads, engine: data.engine, steps: 0 }).sayLoaded();
    if (data.draw !== this.request) return undefined; // of a picture that nobody waits for any more
    if (data.problem) return this.fail(data.problem);
    if (data.cancelled) return this.rest("Cancelled.");
    if (data.finished) return this.finished(data.remark);
    if (data.pixels) this.show(data.name, data.pixels);
    if (data.done) return this.keep(data.name);
    element("progress").value = ++this.steps / this.total;
    return say(`Step ${this.steps} of ${this.total} …`);
  }

  arriving({ name, bytes, size }) {
    this.arrived.set(name, bytes);
    element("progress").value = bytes / size;
    say(`Loading ${name.split("/").at(-1)}: ${megabytes(bytes)} of ${megabytes(size)} …`);
    if (bytes === size) this.sayLoaded();
  }

  show(name, pixels) {
    const canvas = element(name);
    const side = this.manifest.picture;
    if (canvas.width !== side) [canvas.width, canvas.height] = [side, side];
    canvas.getContext("2d").putImageData(new ImageData(pixels, side, side), 0, 0);
    canvas.parentElement.querySelector("img").hidden = true;
    element(`${name}-title`).textContent = title(this.jobs[name]);
    delete this.drawn[name];
  }

  keep(name) {
    this.drawn[name] = toHash(this.jobs[name]);
    this.shown[name] = this.jobs[name];
    element(name).setAttribute("aria-label", `“${this.jobs[name].prompt}”, ${title(this.jobs[name])}`);
    element("save").disabled = false;
  }

  rest(text) {
    element("progress").value = 0;
    element("cancel").disabled = true;
    say(text);
  }

  finished(remark) {
    this.rest(`Drawn in ${((performance.now() - this.began) / 1000).toFixed(1)} s.${remark}`);
  }

  /** After a problem the next picture starts with a new worker. */
  fail(text) {
    this.worker?.terminate();
    this.worker = null;
    this.threads = 0;
    this.rest(text);
  }

  sayLoaded() {
    const { files } = this.manifest;
    const { bytes } = this.runtimes[this.engine];
    if (this.arrived.size === 0) {
      const model = ["unet.onnx", "decoder.onnx", "text_encoder.onnx"].map((name) => files[name].bytes);
      const sum = megabytes(bytes + model.reduce((total, size) => total + size));
      const sized = ([name, file]) => `${name} ${megabytes(files[file].bytes)}`;
      const adapters = Object.entries(this.manifest.adapters).map(sized);
      element("loaded").textContent = `Nothing is loaded yet. The first picture loads ${this.manifest.model} and what ` +
        `computes it, ${sum} together, and the adapters that it needs (${adapters.join(", ")}).`;
      return;
    }
    const large = [...this.arrived].filter(([, size]) => size > 100_000);
    const parts = large.map(([name, size]) => `${name.split("/").at(-1)} ${megabytes(size)}`);
    const where = this.engine === "webgpu" ? "on the GPU" : `with WebAssembly, threads: ${this.threads}`;
    const how = this.threads ? ` ONNX Runtime ${this.runtimes.version} computes ${where}.` : "";
    element("loaded").textContent = `Loaded: ${parts.join(", ")}.${how}`;
  }

  /** The picture with the adapter if there is one, as a file that the notebooks' playground opens with its settings. */
  async save() {
    const name = this.shown.after && !element("after").closest("figure").hidden ? "after" : "before";
    const { version, preset, runs } = this.manifest;
    const blob = await new Promise((resolve) => element(name).toBlob(resolve, "image/png"));
    const png = withSettings(new Uint8Array(await blob.arrayBuffer()), { version, preset, runs, ...this.shown[name] });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([png], { type: "image/png" }));
    link.download = `minisd-${this.shown[name].adapter}-seed${this.shown[name].seed}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  async copyLink() {
    history.replaceState(null, "", `#${toHash(this.form.settings)}`);
    const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
    say(copied ? "The link is in the clipboard." : "The link is in the address bar.");
  }
}

if (typeof WebAssembly !== "object") {
  say("This browser has no WebAssembly, so it cannot draw here. The notebooks draw wherever Python runs.");
} else {
  Promise.all([
    json("model/manifest.json"),
    json("ort/runtime.json"),
    chosenEngine(location.search, navigator.gpu),
  ]).then(
    ([manifest, runtimes, engine]) => new Page(manifest, runtimes, engine),
    () => say("The description of the model did not arrive. Load the page again."),
  );
}
