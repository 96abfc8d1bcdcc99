// CLIP's tokenizer: text to numbers, by byte pair encoding (Sennrich et al. 2016, arXiv 1508.07909).
//
// A port of what `tokenizers` does with CLIP's settings. A test compares the two on captions and on odd texts.

const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
const END_OF_WORD = "</w>";

/** The letter that stands for each byte: itself where it can be printed, else one from 256 on. */
const BYTES = (() => {
  const shown = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let hidden = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(shown(byte) ? byte : hidden++));
})();

export class Tokenizer {
  /** facts: what tokenizer.json of the export holds. */
  constructor({ vocab, merges, start, end, pad, length }) {
    Object.assign(this, { vocab, start, end, pad, length });
    this.ranks = new Map(merges.map((merge, rank) => [merge, rank]));
    const escaped = [start, end, pad].map((token) => token.replace(/[|!<>]/g, "\\$&"));
    this.special = new RegExp(`(${escaped.join("|")})`);
  }

  /** The numbers of a text, between start and end, however many. */
  encode(text) {
    const pieces = text.split(this.special).flatMap((piece, i) => (i % 2 ? [this.vocab[piece]] : this.plain(piece)));
    return [this.vocab[this.start], ...pieces, this.vocab[this.end]];
  }

  /** The numbers of a text, cut or padded to the length that the text encoder reads: an Int32Array. */
  padded(text) {
    const ids = this.encode(text);
    const kept = ids.length > this.length ? [...ids.slice(0, this.length - 1), ids.at(-1)] : ids;
    return new Int32Array(this.length).fill(this.vocab[this.pad]).map((pad, i) => kept[i] ?? pad);
  }

  /** The numbers of a text without special tokens. */
  plain(text) {
    // Letter by letter, as `tokenizers` does: the whole word would end a Greek one in another sigma
    const lower = Array.from(text.normalize("NFC"), (letter) => letter.toLowerCase()).join("");
    const words = lower.match(WORDS) ?? [];
    return words.flatMap((word) => this.merged(word).map((token) => this.vocab[token] ?? this.vocab[this.end]));
  }

  /** A word as tokens: its bytes, joined pair by pair, the pair learnt first before the others. */
  merged(word) {
    const letters = Array.from(new TextEncoder().encode(word), (byte) => BYTES[byte]);
    letters.push(letters.pop() + END_OF_WORD);
    for (;;) {
      const ranks = letters.slice(1).map((right, i) => this.ranks.get(`${letters[i]} ${right}`) ?? Infinity);
      const best = Math.min(...ranks);
      if (best === Infinity) return letters;
      const at = ranks.indexOf(best);
      letters.splice(at, 2, letters[at] + letters[at + 1]);
    }
  }
}
