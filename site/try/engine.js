// What computes: the GPU by WebGPU where there is one, else WebAssembly.

/** "webgpu" or "wasm". search: the address from its "?" on; ?engine=wasm or ?engine=webgpu there decides. */
export async function chosenEngine(search, gpu) {
  const asked = new URLSearchParams(search).get("engine");
  if (asked === "wasm" || asked === "webgpu") return asked;
  let adapter = null;
  try {
    adapter = await gpu?.requestAdapter();
  } catch {
    // As good as none
  }
  // Some browsers pretend a GPU, which is slower than WebAssembly
  const pretended = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter;
  return adapter && !pretended ? "webgpu" : "wasm";
}
