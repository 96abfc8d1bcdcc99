// From noise to a picture's latents: DDIM with classifier-free guidance, as chapter 01 writes it in Python.
//
// Latents are Float32Arrays of C * h * w numbers; alphas[t] is alpha-bar of timestep t.

const STEPS_OFFSET = 1; // Stable Diffusion's samplers end at timestep 1, not 0

/** alpha-bar for each timestep, decreasing: Stable Diffusion's "scaled linear" schedule. */
export function alphasCumprod({ num_train_timesteps: count, beta_start, beta_end }) {
  const [first, last] = [Math.sqrt(beta_start), Math.sqrt(beta_end)];
  let product = 1;
  // alpha_bar_t = product of (1 - beta_s) for s <= t, with betas that are linear in their square roots
  return Float32Array.from({ length: count }, (_, t) => {
    const root = first + ((last - first) * t) / (count - 1);
    return (product *= 1 - root * root);
  });
}

/** The timesteps that sampling visits, from noisy to clean, evenly spaced. */
export function inferenceTimesteps(steps, count) {
  const stride = Math.floor(count / steps);
  return Array.from({ length: steps }, (_, i) => (steps - 1 - i) * stride + STEPS_OFFSET);
}

/** Both outputs of the U-Net, for the empty prompt and for the prompt, as one. Ho and Salimans 2022, equation 6. */
export function guide(empty, prompted, guidance) {
  // out = out(empty) + guidance * (out(prompt) - out(empty))
  return empty.map((out, i) => out + guidance * (prompted[i] - out));
}

/** The clean latents and the noise that the U-Net's output implies. Salimans and Ho 2022, appendix D. */
export function predicted(predictionType, latents, output, alpha) {
  const [a, s] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
  if (predictionType === "epsilon") {
    // x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)
    return { clean: latents.map((x, i) => (x - s * output[i]) / a), noise: output };
  }
  // x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v,  eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t
  return {
    clean: latents.map((x, i) => a * x - s * output[i]),
    noise: latents.map((x, i) => a * output[i] + s * x),
  };
}

/** The latents at a less noisy timestep. Song et al. 2021, equation 12 with sigma = 0. */
export function ddimStep({ clean, noise }, alphaPrevious) {
  const [a, s] = [Math.sqrt(alphaPrevious), Math.sqrt(1 - alphaPrevious)];
  // x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) eps
  return clean.map((x, i) => a * x + s * noise[i]);
}

/**
 * The whole loop: noise latents to clean ones.
 *
 * unet(latents, timestep) gives the outputs for the prompt, and for the empty prompt if guidance is above 1:
 * {prompted, empty}. onStep(steps done, the clean latents that this step aims at) may wait, and may throw to stop.
 */
export async function sample(unet, latents, { steps, guidance, schedule, predictionType }, onStep) {
  const alphas = alphasCumprod(schedule);
  const stride = Math.floor(alphas.length / steps);
  for (const [step, t] of inferenceTimesteps(steps, alphas.length).entries()) {
    const { prompted, empty } = await unet(latents, t);
    const output = guidance > 1 ? guide(empty, prompted, guidance) : prompted;
    const both = predicted(predictionType, latents, output, alphas[t]);
    latents = ddimStep(both, alphas[Math.max(t - stride, 0)]);
    await onStep(step + 1, both.clean);
  }
  return latents;
}
