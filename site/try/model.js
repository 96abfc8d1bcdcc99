// The model: three networks, a tokenizer and adapters, fetched when they are first needed.
//
// `ort` is ONNX Runtime; `read(name)` gives a file of the export as an ArrayBuffer. So the same code runs in the page's
// worker and under Node, where the tests compare it with PyTorch.

import { readAdapter, stack } from "./adapters.js";
import { noise } from "./noise.js";
import { sample } from "./sampler.js";
import { Tokenizer } from "./tokenizer.js";

export class Cancelled extends Error {}

/** Arrays of one length one after another. */
function joined(parts) {
  const all = new Float32Array(parts.length * parts[0].length);
  parts.forEach((part, i) => all.set(part, i * part.length));
  return all;
}

export class Model {
  /** manifest: the export's manifest.json. providers: what computes, the best first: ["webgpu", "wasm"]. */
  constructor(ort, manifest, read, providers = ["wasm"]) {
    Object.assign(this, { ort, manifest, read, providers, adapters: new Map(), texts: new Map() });
  }

  /** Fetches what every picture needs. */
  async load() {
    const json = async (name) => JSON.parse(new TextDecoder().decode(await this.read(name)));
    this.tokenizer = new Tokenizer(await json("tokenizer.json"));
    this.textEncoder = await this.session("text_encoder.onnx");
    this.decoder = await this.session("decoder.onnx");
    this.unet = await this.session("unet.onnx");
  }

  async session(name) {
    const bytes = new Uint8Array(await this.read(name));
    return this.ort.InferenceSession.create(bytes, { executionProviders: this.providers });
  }

  /** Runs one network: {name: [numbers, shape]} to the numbers of its output. */
  async run(session, inputs) {
    const kind = (values) => (values instanceof Int32Array ? "int32" : "float32");
    const tensors = Object.fromEntries(
      Object.entries(inputs).map(([name, [values, shape]]) => [name, new this.ort.Tensor(kind(values), values, shape)]),
    );
    const { output } = await session.run(tensors);
    const values = output.data;
    output.dispose();
    return values;
  }

  /** The embeddings of a prompt, a Float32Array of L * D numbers. */
  async encode(prompt) {
    if (!this.texts.has(prompt)) {
      const ids = this.tokenizer.padded(prompt);
      if (this.texts.size > 32) this.texts.clear();
      this.texts.set(prompt, await this.run(this.textEncoder, { input_ids: [ids, [1, ids.length]] }));
    }
    return this.texts.get(prompt);
  }

  /** What is cut off a prompt, a sentence or "". */
  cut(prompt) {
    const [tokens, read] = [this.tokenizer.encode(prompt).length, this.tokenizer.length];
    return tokens > read ? ` The prompt has ${tokens} tokens, and the model reads the first ${read}.` : "";
  }

  /** A picture as pixels (RGBA, a Uint8ClampedArray) that the decoder makes of latents. */
  async decode(latents) {
    const { latents: shape, picture } = this.manifest;
    const planes = await this.run(this.decoder, { latents: [latents, [1, ...shape]] });
    const size = picture * picture;
    const pixels = new Uint8ClampedArray(4 * size).fill(255);
    for (let i = 0; i < size; i++) {
      for (let channel = 0; channel < 3; channel++) pixels[4 * i + channel] = 255 * planes[channel * size + i];
    }
    return pixels;
  }

  /** A, B and their rank for the adapters that settings ask for; files are fetched when they are first needed. */
  async adapted({ adapter, scale, ...weights }) {
    const { adapters: files, layers } = this.manifest;
    const names = { none: [], mix: Object.keys(files) }[adapter] ?? [adapter];
    for (const name of names) {
      if (!this.adapters.has(name)) this.adapters.set(name, readAdapter(await this.read(files[name]), layers));
    }
    const weight = (name) => scale * (adapter === "mix" ? weights[name] : 1);
    return stack(names.map((name) => ({ adapter: this.adapters.get(name), weight: weight(name) })), layers);
  }

  /** The U-Net with prompt and adapter in place, as `sample` calls it. */
  async prepared(settings) {
    const [, height, width] = this.manifest.latents;
    const { A, B, rank } = await this.adapted(settings);
    const states = [];
    for (const text of settings.guidance > 1 ? ["", settings.prompt] : [settings.prompt]) {
      states.push(await this.encode(text));
    }
    const batch = states.length;
    const length = this.tokenizer.length;
    const fixed = {
      encoder_hidden_states: [joined(states), [batch, length, states[0].length / length]],
      lora_A: [A, [rank, A.length / rank]],
      lora_B: [B, [B.length / rank, rank]],
    };
    return async (latents, timestep) => {
      const size = latents.length;
      const inputs = {
        ...fixed,
        latents: [joined(Array(batch).fill(latents)), [batch, size / (height * width), height, width]],
        timestep: [Float32Array.of(timestep), [1]],
      };
      const output = await this.run(this.unet, inputs);
      return { empty: output.subarray(0, size), prompted: output.subarray(-size) };
    };
  }

  /**
   * The picture of these settings, as pixels.
   *
   * onStep(steps done, pixels of what the step aims at; null after the last) is awaited.
   * Throws Cancelled after the step in which isCancelled() turns true.
   */
  async draw(settings, onStep = null, isCancelled = () => false) {
    const { latents: shape, schedule, prediction_type: predictionType } = this.manifest;
    const unet = await this.prepared(settings);
    const start = noise(settings.seed, shape.reduce((product, size) => product * size));
    const { steps, guidance } = settings;
    const latents = await sample(unet, start, { steps, guidance, schedule, predictionType }, async (done, clean) => {
      if (isCancelled()) throw new Cancelled();
      if (onStep) await onStep(done, done < steps ? await this.decode(clean) : null);
      if (isCancelled()) throw new Cancelled();
    });
    return this.decode(latents);
  }
}
