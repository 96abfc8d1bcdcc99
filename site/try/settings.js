// All that a picture depends on besides the model: checked, as a link, and as words.
//
// The fields are those of the notebooks' playground: prompt, seed, steps, guidance, adapter, doodles, vintage, scale.

/** What is wrong with settings, a sentence, or "". */
export function complaint(settings, { limits, adapters }) {
  const choices = choicesOf(adapters);
  if (!choices.includes(settings.adapter)) return `The adapter should be one of ${choices.join(", ")}.`;
  for (const [name, [low, high]] of Object.entries(limits)) {
    const value = settings[name];
    const whole = name === "seed" || name === "steps";
    if (!(value >= low && value <= high) || (whole && !Number.isInteger(value))) {
      return `The ${name} should be a ${whole ? "whole " : ""}number from ${low} to ${high}.`;
    }
  }
  return "";
}

/** What can be chosen as an adapter: none, each there is, and the mix of two. */
export function choicesOf(adapters) {
  const names = Object.keys(adapters);
  return ["none", ...names, ...(names.length > 1 ? ["mix"] : [])];
}

/** The settings of the picture without an adapter. */
export function ofBase(settings) {
  return { ...settings, adapter: "none", doodles: 0.5, vintage: 0.5, scale: 1 };
}

/** The settings as the part of an address behind its #. */
export function toHash(settings) {
  return new URLSearchParams(Object.entries(settings)).toString();
}

/** The settings that an address carries, those it leaves out from `defaults`; null for an address without any. */
export function fromHash(hash, defaults) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const names = Object.keys(defaults).filter((name) => given.has(name));
  if (names.length === 0) return null;
  const read = (name) => (typeof defaults[name] === "number" ? Number(given.get(name) || NaN) : given.get(name));
  return { ...defaults, ...Object.fromEntries(names.map((name) => [name, read(name)])) };
}

/** A few words: "doodles × 0.8". */
export function title({ adapter, doodles, vintage, scale }) {
  if (adapter === "none") return "without adapter";
  const what = adapter === "mix" ? `doodles ${doodles} + vintage ${vintage}` : adapter;
  return `${what} × ${scale}`;
}
