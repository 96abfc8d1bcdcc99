// Adapters: the .safetensors files that diffusers reads, and what the U-Net's file takes of them.
//
// y = W x + B A x * alpha / r. The U-Net takes A of all layers side by side and B of all layers below each other, with
// the scaling in B. Several adapters at once are one with more rows in A and more columns in B (chapter 02).

/** The numbers of a safetensors file: {metadata, tensors: Map of name to {shape, values}}. Throws for another file. */
export function readSafetensors(buffer) {
  const view = new DataView(buffer);
  const size = Number(view.getBigUint64(0, true));
  if (size > buffer.byteLength - 8) throw new Error("This is no safetensors file.");
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const { __metadata__: metadata = {}, ...described } = header;
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(described)) {
    const bytes = buffer.slice(8 + size + from, 8 + size + to);
    tensors.set(name, { shape, values: numbers(dtype, bytes) });
  }
  return { metadata, tensors };
}

function numbers(dtype, bytes) {
  if (dtype === "F32") return new Float32Array(bytes);
  const bits = dtype === "F16" || dtype === "BF16" ? new Uint16Array(bytes) : null;
  if (!bits) throw new Error(`The file holds numbers of the kind ${dtype}, which this page does not read.`);
  if (dtype === "F16") return Float32Array.from(bits, halfToNumber);
  return new Float32Array(Uint32Array.from(bits, (value) => value << 16).buffer);
}

/** A number of IEEE 754's half precision: 1 bit sign, 5 bits exponent, 10 bits fraction. */
export function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const [exponent, fraction] = [(bits >> 10) & 31, (bits & 1023) / 1024];
  if (exponent === 0) return sign * 2 ** -14 * fraction;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * 2 ** (exponent - 15) * (1 + fraction);
}

/** An adapter file as {layers: Map of layer name to {A, B, rank, scaling}}. Throws where it does not fit the layers. */
export function readAdapter(buffer, layers) {
  const { metadata, tensors } = readSafetensors(buffer);
  const config = JSON.parse(metadata.lora_adapter_metadata ?? "{}");
  const found = new Map();
  for (const [name, widthIn, widthOut] of layers) {
    const A = tensors.get(`unet.${name}.lora_A.weight`);
    const B = tensors.get(`unet.${name}.lora_B.weight`);
    if (!A || !B) continue;
    const rank = A.shape[0];
    if (A.shape[1] !== widthIn || B.shape[0] !== widthOut || B.shape[1] !== rank) {
      throw new Error(`${name} has another shape in this adapter: it is for another model.`);
    }
    const alpha = config["unet.alpha_pattern"]?.[`^${name}`] ?? config["unet.lora_alpha"] ?? rank;
    const scaling = alpha / (config["unet.use_rslora"] ? Math.sqrt(rank) : rank);
    found.set(name, { A: A.values, B: B.values, rank, scaling });
  }
  if (2 * found.size !== tensors.size) {
    throw new Error("The file has no adapter in diffusers' layout for this model, or one that changes other layers.");
  }
  return found;
}

/** The weighted sum of adapters, as the U-Net takes it: {A, B, rank}. parts: [{adapter, weight}]; none are allowed. */
export function stack(parts, layers) {
  const rankOf = (adapter) => Math.max(...Array.from(adapter.values(), (layer) => layer.rank));
  const ranks = parts.map(({ adapter }) => rankOf(adapter));
  const rank = Math.max(1, ranks.reduce((sum, r) => sum + r, 0)); // without an adapter: one row of zeros
  const widthIn = layers.reduce((sum, [, columns]) => sum + columns, 0);
  const widthOut = layers.reduce((sum, [, , rows]) => sum + rows, 0);
  const A = new Float32Array(rank * widthIn);
  const B = new Float32Array(widthOut * rank);
  let firstRank = 0;
  parts.forEach(({ adapter, weight }, part) => {
    let [column, row] = [0, 0];
    for (const [name, columns, rows] of layers) {
      const layer = adapter.get(name);
      for (let r = 0; layer && r < layer.rank; r++) {
        A.set(layer.A.subarray(r * columns, (r + 1) * columns), (firstRank + r) * widthIn + column);
        // [w1 s1 B1, w2 s2 B2] [A1; A2] = w1 s1 B1 A1 + w2 s2 B2 A2
        for (let i = 0; i < rows; i++) {
          B[(row + i) * rank + firstRank + r] = layer.B[i * layer.rank + r] * layer.scaling * weight;
        }
      }
      column += columns;
      row += rows;
    }
    firstRank += ranks[part];
  });
  return { A, B, rank };
}
