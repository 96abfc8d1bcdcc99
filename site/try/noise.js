// The noise of a seed, the same as in the notebooks: PyTorch's generator on a CPU.
//
// torch.Generator("cpu") is a Mersenne Twister (Matsumoto and Nishimura 1998, MT19937). torch.randn takes 24 bits of
// each number for a uniform one, and turns sixteen of these at a time into normal ones (Box and Muller 1958): see
// normal_fill in PyTorch's aten/src/ATen/native/cpu/DistributionTemplates.h.

const N = 624;
const M = 397;

/** A function that returns the next whole number from 0 to 2^32 - 1 each time. */
export function mersenneTwister(seed) {
  const state = new Uint32Array(N);
  state[0] = seed;
  for (let i = 1; i < N; i++) {
    const last = state[i - 1] ^ (state[i - 1] >>> 30);
    state[i] = Math.imul(1812433253, last) + i;
  }
  let next = N;
  return () => {
    if (next === N) {
      twist(state);
      next = 0;
    }
    let x = state[next++];
    x ^= x >>> 11;
    x ^= (x << 7) & 0x9d2c5680;
    x ^= (x << 15) & 0xefc60000;
    return (x ^ (x >>> 18)) >>> 0;
  };
}

function twist(state) {
  for (let i = 0; i < N; i++) {
    const x = (state[i] & 0x80000000) | (state[(i + 1) % N] & 0x7fffffff);
    state[i] = state[(i + M) % N] ^ (x >>> 1) ^ (x & 1 ? 0x9908b0df : 0);
  }
}

/** Standard normal noise, a Float32Array of `size` numbers: torch.randn(size, generator=manual_seed(seed)). */
export function noise(seed, size) {
  if (size < 16) throw new RangeError("PyTorch draws fewer than 16 numbers in another way");
  const random = mersenneTwister(seed);
  const uniform = () => (random() & 0xffffff) / 2 ** 24;
  const values = Float32Array.from({ length: size }, uniform);
  for (let i = 0; i + 16 <= size; i += 16) boxMuller(values.subarray(i, i + 16));
  if (size % 16 !== 0) {
    const last = values.subarray(size - 16);
    last.set(Float32Array.from({ length: 16 }, uniform));
    boxMuller(last);
  }
  return values;
}

/** Sixteen uniform numbers in 0..1, in place, to sixteen normal ones: the first half of pairs, then the second. */
function boxMuller(values) {
  for (let i = 0; i < 8; i++) {
    // z1 = sqrt(-2 ln u1) cos(2 pi u2), z2 = sqrt(-2 ln u1) sin(2 pi u2)
    const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
    const angle = 2 * Math.PI * values[i + 8];
    values[i] = radius * Math.cos(angle);
    values[i + 8] = radius * Math.sin(angle);
  }
}
