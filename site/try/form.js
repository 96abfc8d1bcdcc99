// The controls of the page: what they offer, what they say, and the prompt builder.

import { buildPrompt, newWords } from "./prompt.js";
import { choicesOf } from "./settings.js";

const element = (id) => document.getElementById(`try-${id}`);
const NUMBERS = ["seed", "steps", "guidance", "scale"];

/** An element with properties and children. */
function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export class Form {
  /** manifest: of the export. onScale: called when a slider of the adapter moves. */
  constructor(manifest, onScale) {
    Object.assign(this, { manifest, onScale });
    for (const name of NUMBERS) {
      [element(name).min, element(name).max] = manifest.limits[name];
    }
    this.offerAdapters();
    this.offerWords();
    element("scale").addEventListener("input", () => this.scaleMoved());
    element("prompt").addEventListener("input", () => this.remark());
    element("adapter").addEventListener("change", () => this.adapterChosen());
  }

  /** The settings as the controls have them. */
  get settings() {
    const { adapters } = this.manifest;
    const numbers = Object.fromEntries(NUMBERS.map((name) => [name, element(name).valueAsNumber]));
    const weights = Object.fromEntries(Object.keys(adapters).map((name) => [name, this.weights[name].valueAsNumber]));
    const adapter = document.querySelector("#try-adapter input:checked").value;
    return { ...this.manifest.first, prompt: element("prompt").value, adapter, ...numbers, ...weights };
  }

  /** Puts settings into the controls. */
  set(settings) {
    element("prompt").value = settings.prompt;
    for (const name of NUMBERS) element(name).value = settings[name];
    for (const [name, slider] of Object.entries(this.weights)) slider.value = settings[name];
    const chosen = document.querySelector(`#try-adapter input[value="${CSS.escape(settings.adapter)}"]`);
    if (chosen) chosen.checked = true;
    this.adapterChosen();
    this.remark();
  }

  offerAdapters() {
    for (const name of choicesOf(this.manifest.adapters)) {
      const radio = make("input", { type: "radio", name: "adapter", value: name, checked: name === "none" });
      element("adapter").append(make("label", {}, radio, ` ${name}`));
    }
    this.weights = {};
    for (const name of Object.keys(this.manifest.adapters)) {
      const [min, max] = this.manifest.limits[name];
      const slider = make("input", { type: "range", min, max, step: 0.05 });
      slider.addEventListener("input", () => this.scaleMoved());
      this.weights[name] = slider;
      element("mix").append(make("label", { className: "wide" }, `${name} `, make("output"), slider));
    }
  }

  adapterChosen() {
    const adapter = document.querySelector("#try-adapter input:checked").value;
    element("mix").hidden = adapter !== "mix";
    element("scale").disabled = adapter === "none";
    this.sayScales();
  }

  scaleMoved() {
    this.sayScales();
    this.onScale();
  }

  sayScales() {
    element("scale-said").value = element("scale").value;
    for (const slider of Object.values(this.weights)) slider.previousElementSibling.value = slider.value;
  }

  /** The menus of the prompt builder; each choice writes the whole sentence. */
  offerWords() {
    const { styles, parts, first } = this.manifest.world;
    this.menus = { style: make("select", {}, ...styles.map(({ label }, i) => make("option", { value: i }, label))) };
    element("builder").append(make("label", { className: "wide" }, "words ", this.menus.style));
    for (const [name, { label, options }] of Object.entries(parts)) {
      this.menus[name] = make("select", {}, ...options.map((word) => make("option", {}, word)));
      this.menus[name].value = first[name];
      element("builder").append(make("label", {}, `${label} `, this.menus[name]));
    }
    element("builder").addEventListener("change", ({ target }) => {
      if (target === this.menus.subject) this.subjectChosen();
      element("prompt").value = this.sentence;
      this.remark();
    });
  }

  /** The colours that this subject comes in; people are told apart by their hair. */
  subjectChosen() {
    const { hair, colors } = this.manifest.world;
    const subject = this.menus.subject.value;
    const options = ["man", "woman"].includes(subject) ? hair : colors[subject];
    this.menus.color.replaceChildren(...options.map((word) => make("option", {}, word)));
  }

  /** The sentence for what is chosen in the menus. */
  get sentence() {
    const parts = Object.fromEntries(Object.entries(this.menus).map(([name, menu]) => [name, menu.value]));
    return buildPrompt(this.manifest.world.styles[parts.style], parts);
  }

  /** What is worth knowing about the prompt. */
  remark() {
    const { known } = this.manifest.world;
    const words = newWords(element("prompt").value, known).map((word) => word.slice(0, 20));
    const listed = words.slice(0, 5).join(", ") + (words.length > 5 ? " …" : "");
    const empty = element("prompt").value.trim() ? "" : "Without words the model draws whatever it likes.";
    element("remark").textContent = words.length ? `In no caption that the model was trained on: ${listed}.` : empty;
  }
}
