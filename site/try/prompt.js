// A sentence for a portrait, in the words that the model was trained on: `captions.prompt` of the course.

const article = (words) => `${"aeiou".includes(words[0]) ? "an" : "a"} ${words}`;
const list = (items) => (items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items.at(-1)}`);

/**
 * style: one of the world's styles, {lead, ending, colors}. parts: {subject, color, headwear, headwear_color, eyewear,
 * neckwear, neckwear_color, clothes_color, background}; "none" is left out. Of people the colour is that of the hair.
 */
export function buildPrompt({ lead, ending, colors }, parts) {
  const colored = (color, name) => (colors ? `${color} ${name}` : name);
  const people = ["man", "woman"].includes(parts.subject);
  const noun = parts.subject === "hero" ? "bat hero" : parts.subject;
  const plain = people || parts.subject === "skeleton"; // every skeleton is white
  const items = [];
  if (people && colors) items.push(`${parts.color} hair`);
  if (parts.headwear !== "none") items.push(article(colored(parts.headwear_color, parts.headwear)));
  if (parts.eyewear !== "none") items.push(parts.eyewear);
  if (parts.neckwear !== "none") items.push(article(colored(parts.neckwear_color, parts.neckwear)));
  const subject = `${lead} ${article(plain ? noun : colored(parts.color, noun))}`;
  const things = items.length ? ` with ${list(items)}` : "";
  const around = `, wearing ${article(parts.clothes_color)} shirt, on ${article(parts.background)} background`;
  return subject + things + (colors ? around : "") + ending;
}

/** The words of a text that no caption of the training had. known: an array of words. */
export function newWords(text, known) {
  const written = text.toLowerCase().match(/[\p{L}\p{N}]+|[^\p{L}\p{N}\s.,;:!?'’"“”()\-_/]/gu) ?? [];
  return [...new Set(written)].filter((word) => !known.includes(word));
}
