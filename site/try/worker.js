// The model in a thread of its own, so that the page never freezes.
//
// It is told {draw: id, jobs: [{name, settings}]} or {cancel: true}; a newer message ends what is being drawn.
// It says {progress}, {loaded}, {name, step, pixels}, {name, pixels, done}, {finished, remark}, {cancelled} or {problem}.
// A second {loaded} means that the GPU gave up, and that what is being drawn begins again with WebAssembly.

import { Cancelled, Model } from "./model.js";

let model = null;
let engine = new URLSearchParams(self.location.search).get("engine");
let latest = 0; // the id of the newest request
let working = Promise.resolve();

self.onmessage = ({ data }) => {
  latest = data.draw ?? latest + 1;
  if (data.draw) working = working.then(() => answer(data));
};

async function answer({ draw, jobs }) {
  const isCancelled = () => draw !== latest;
  try {
    if (isCancelled()) throw new Cancelled();
    model ??= await load();
    for (const { name, settings } of jobs) {
      const onStep = async (step, pixels) => {
        self.postMessage({ draw, name, step, pixels });
        await new Promise((resolve) => setTimeout(resolve)); // lets a newer message in
      };
      const pixels = await model.draw(settings, onStep, isCancelled);
      self.postMessage({ draw, name, pixels, done: true });
    }
    self.postMessage({ draw, finished: true, remark: model.cut(jobs[0].settings.prompt) });
  } catch (error) {
    if (engine === "webgpu" && !(error instanceof Cancelled || error instanceof NotArrived)) {
      [model, engine] = [null, "wasm"];
      return answer({ draw, jobs });
    }
    self.postMessage(error instanceof Cancelled ? { draw, cancelled: true } : { draw, problem: error.message });
  }
}

/** The model on the engine that the page chose; where a GPU's driver refuses, WebAssembly still can. */
async function load() {
  const runtimes = JSON.parse(new TextDecoder().decode(await read("ort/runtime.json")));
  if (engine === "webgpu") {
    const loaded = await loadOn(engine, runtimes).catch(() => null);
    if (loaded) return loaded;
  }
  engine = "wasm";
  return loadOn(engine, runtimes);
}

async function loadOn(chosen, { version, ...runtimes }) {
  const { module, binary, bytes } = runtimes[chosen];
  const manifest = JSON.parse(new TextDecoder().decode(await read("model/manifest.json")));
  const ort = await import(`./ort/${module}`);
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.wasmBinary = await read(`ort/${binary}`, bytes, version);
  const file = (name) => read(`model/${name}`, manifest.files[name].bytes, manifest.files[name].hash);
  const loaded = new Model(ort, manifest, file, [chosen]);
  await loaded.load();
  await loaded.encode(""); // whether it computes, too
  self.postMessage({ loaded: true, engine: chosen, threads: ort.env.wasm.numThreads });
  return loaded;
}

class NotArrived extends Error {}

/** A file beside this one. size: its bytes, if they are known. version: so that a cache never gives an older one. */
async function read(name, size = 0, version = "") {
  const address = new URL(version ? `${name}?${version}` : name, import.meta.url);
  const response = await fetch(address, version ? {} : { cache: "no-cache" }).catch(() => null);
  if (!response?.ok) {
    const why = response ? ` (${response.status})` : "";
    throw new NotArrived(`The file ${name} did not arrive${why}. Press Draw to try again.`);
  }
  const parts = [];
  let bytes = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) break;
    parts.push(value);
    bytes += value.length;
    if (size) self.postMessage({ progress: { name, bytes, size } });
  }
  if (size && bytes !== size) {
    throw new NotArrived(`The file ${name} arrived with ${bytes} of its ${size} bytes. Press Draw to try again.`);
  }
  return new Blob(parts).arrayBuffer();
}
