// A PNG file with the settings of its picture, in the chunk that the notebooks' playground reads.

const NAME = "lora-by-hand";
const AFTER_HEADER = 8 + 25; // the signature, then the chunk IHDR

/** A PNG's bytes with an object in a tEXt chunk, as JSON in ASCII. */
export function withSettings(png, facts) {
  const escape = (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`;
  const json = JSON.stringify(facts).replace(/[\u007f-\uffff]/g, escape);
  const text = new TextEncoder().encode(`tEXt${NAME}\0${json}`);
  const chunk = new Uint8Array(4 + text.length + 4);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, text.length - 4); // of the data, without the chunk's name
  chunk.set(text, 4);
  view.setUint32(4 + text.length, crc32(text));
  const whole = new Uint8Array(png.length + chunk.length);
  whole.set(png.subarray(0, AFTER_HEADER));
  whole.set(chunk, AFTER_HEADER);
  whole.set(png.subarray(AFTER_HEADER), AFTER_HEADER + chunk.length);
  return whole;
}

/** The checksum that PNG's chunks have: the PNG specification's annex D, bit by bit. */
function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}
