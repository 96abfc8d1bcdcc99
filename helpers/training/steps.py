"""One step of LoRA fine-tuning of a latent diffusion model: what it computes from what it draws.

What it draws is in `helpers.training.draws`. One step, of a batch of pictures x with captions c (Rombach et al. 2022,
arXiv 2112.10752, equation 3):

    z   ~ q(z | x)                          the VAE's posterior: mean + std * noise, both cached
    t   ~ uniform(0, T),  eps ~ N(0, 1)     a timestep and a noise for each picture
    z_t = add_noise(z, eps, t)
    loss = mean of w_t * (unet(z_t, t, c) - target)^2      target: eps or v, w_t: 1 or Min-SNR
    AdamW on the LoRA matrices alone, gradients clipped

accelerate knows the device, the precision and the other processes. In a step it is asked for four things only: to run
the forward pass in the chosen precision, to scale the loss where fp16 needs it, to clip, and to add up over processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor, nn

from helpers import lora
from helpers.base.device import default_device, has_bfloat16
from helpers.diffusion.components import Components
from helpers.diffusion.schedule import add_noise, diffusion_target, loss_weights
from helpers.lora import dora
from helpers.presets.configuration import TEXT_ATTENTION, TrainConfig
from helpers.training.draws import StepDraw, seeded
from helpers.training.runs import TrainingError

SMALLEST_SCALE = 1.0  # of the loss in fp16: when even this overflows, something else is wrong


# --- where and how it runs ---------------------------------------------------------------------------------------
def new_accelerator(config: TrainConfig, device: torch.device | str | None = None) -> Accelerator:
    """accelerate's view of this process: its device, its precision, and the other processes of the same run.

    device: that of the model, or None for the best there is. Raises TrainingError for a precision that it has not.
    """
    device = torch.device(device or default_device())
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or device.type == "cpu"
    precision = resolve_precision(config.mixed_precision, torch.device("cpu") if on_cpu else device)
    # accelerate keeps one state a process and refuses another precision, or device, than the first: begin anew
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # A batch is cut into parts by `own_parts`; accelerate must not divide the loss once more
    once = GradientAccumulationPlugin(num_steps=1)
    # The others wait for the first process while it fills a cache, or validates
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision=precision, gradient_accumulation_plugin=once, kwargs_handlers=[patience]
    )
    if precision == "fp16" and accelerator.scaler is None:
        raise TrainingError("mixed_precision fp16 needs a GPU; on a CPU take bf16, or no")
    if precision == "fp16" and config.batch_size < accelerator.num_processes:  # its scaler wants a loss from each
        raise TrainingError(
            f"in fp16 each of the {accelerator.num_processes} processes needs a picture, and a batch has "
            f"{config.batch_size}: take bf16, or a larger batch_size"
        )
    return accelerator


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """Which of "no", "bf16" and "fp16" a setting means on this device.

    "auto" is half precision on a CUDA GPU, of the kind that it has, and "no" elsewhere.
    Raises TrainingError for bf16 on a GPU that only imitates it.
    """
    if mixed_precision == "auto":
        return "no" if device.type != "cuda" else "bf16" if has_bfloat16(device) else "fp16"
    if mixed_precision == "bf16" and device.type == "cuda" and not has_bfloat16(device):
        raise TrainingError("this GPU has no bfloat16 of its own and would be slow: take mixed_precision fp16, or auto")
    return mixed_precision


# --- what trains -------------------------------------------------------------------------------------------------
def trained_parts(components: Components, config: TrainConfig) -> dict[str, nn.Module]:
    """The parts that get a LoRA, by name: the U-Net, and the text encoder if the settings say so."""
    parts = {"unet": components.unet}
    return parts | {"text_encoder": components.text_encoder} if config.train_text_encoder else parts


def check_trainable(components: Components, config: TrainConfig) -> None:
    """Raises TrainingError unless the LoRA matrices of the trained parts are all that trains, and are float32."""
    parts = trained_parts(components, config)
    wanted = {id(p) for part in parts.values() for p in lora.lora_parameters(part)}
    if not wanted:
        raise TrainingError("the U-Net has no LoRA layers: nothing to train")
    for part in ("unet", "text_encoder", "vae"):
        for name, parameter in getattr(components, part).named_parameters():
            if parameter.requires_grad != (id(parameter) in wanted):
                should = "trained" if id(parameter) in wanted else "frozen"
                raise TrainingError(f"{part}: {name} should be {should}, and is not")
            if parameter.requires_grad and parameter.dtype != torch.float32:
                raise TrainingError(
                    f"{part}: {name} is {parameter.dtype}: small updates would be lost, train it in float32"
                )


@contextmanager
def injected(components: Components, config: TrainConfig, accelerator: Accelerator) -> Iterator[torch.optim.Optimizer]:
    """The trained parts with fresh LoRA layers, and their optimizer; afterwards their weights are what they were."""
    unet, device = components.unet, components.device
    targets = {"unet": config.targets, "text_encoder": TEXT_ATTENTION}
    settings = config.rank, config.alpha, config.lora_dropout, config.use_rslora
    parts = trained_parts(components, config)
    with ExitStack() as undo:
        if config.channels_last:  # before injection: A and B, and what AdamW keeps of them, stay in the usual layout
            unet.to(memory_format=torch.channels_last)
            undo.callback(unet.to, memory_format=torch.contiguous_format)
        for name, part in parts.items():
            with seeded(config.seed, "init" if name == "unet" else f"init of the {name}", 0, device):
                lora.inject(part, targets[name], *settings, kinds=dora.KINDS if config.use_dora else lora.KINDS)
            undo.callback(part.eval)
            undo.callback(lora.remove, part)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            undo.callback(unet.disable_gradient_checkpointing)
        check_trainable(components, config)
        # One kernel for all matrices: they are many and small, so that a loop over them is mostly overhead
        fused = device.type in ("cpu", "cuda")
        undo.callback(accelerator.free_memory)
        yield accelerator.prepare_optimizer(
            torch.optim.AdamW(
                parameter_groups(parts, config.lora_plus), config.learning_rate, config.betas,
                weight_decay=config.weight_decay, fused=fused,
            )
        )  # fmt: skip


def parameter_groups(parts: dict[str, nn.Module], ratio: float) -> list[nn.Parameter] | list[dict[str, Any]]:
    """What the optimizer trains of the parts: all alike, or (ratio not 1) each B apart, ratio times as fast."""
    parameters = [p for part in parts.values() for p in lora.lora_parameters(part)]
    if ratio == 1:
        return parameters
    fast = {id(layer.lora_B.weight) for part in parts.values() for layer in lora.lora_layers(part).values()}
    return [
        {"params": [p for p in parameters if id(p) not in fast], "ratio": 1.0},
        {"params": [p for p in parameters if id(p) in fast], "ratio": ratio},
    ]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then constant, linear or cosine down to zero."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    # p runs from 0 to 1 over the steps that follow the warm-up
    p = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    factors = {"constant": 1.0, "linear": 1.0 - p, "cosine": 0.5 * (1.0 + math.cos(math.pi * p))}
    return config.learning_rate * factors[config.lr_schedule]


# --- one step ----------------------------------------------------------------------------------------------------
def own_parts(draw: StepDraw, config: TrainConfig, accelerator: Accelerator) -> Iterator[tuple[int, StepDraw]]:
    """(number, part) of each part of a batch that this process computes; empty ones are left out.

    P processes share the batch out as evenly as it goes; each cuts its share into A parts to accumulate over.
    """
    own = config.gradient_accumulation_steps
    share = draw.split(accelerator.num_processes)[accelerator.process_index]
    first = accelerator.process_index * own
    for number, part in enumerate(share.split(own), start=first):
        if len(part):
            yield number, part


def sum_over_processes(loss: Tensor, parameters: list[nn.Parameter], accelerator: Accelerator) -> Tensor:
    """The loss and, in place, the gradients of all processes added up, in one message; returns the loss.

    DistributedDataParallel sends gradients while the backward pass still runs, which pays for large ones. Those of a
    LoRA are small (Stable Diffusion 2.1 at rank 16: 13 MB), so the plain sum will do, and the U-Net stays unwrapped.
    """
    if accelerator.num_processes == 1:
        return loss
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    loss, *sums = accelerator.reduce(message, "sum").split([1, *(p.numel() for p in parameters)])
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = total.view_as(parameter)
    return loss.squeeze()


def part_loss(components: Components, part: StepDraw, config: TrainConfig) -> Tensor:
    """Sum over the pictures of a part of w_t * mean over the latent of (output - target)^2, a float32 scalar."""
    alphas_cumprod, kind = components.noise_scheduler.alphas_cumprod, components.prediction_type
    noisy_latents = add_noise(part.latents, part.noise, part.timesteps, alphas_cumprod)
    target = diffusion_target(kind, part.latents, part.noise, part.timesteps, alphas_cumprod)
    weights = loss_weights(part.timesteps, alphas_cumprod, kind, config.snr_gamma, config.rescale_weights)
    states, unet = part.encoder_hidden_states, components.unet
    if config.train_text_encoder:  # what it makes of a caption changes from step to step, so the cache is of no use
        states = components.text_encoder(part.input_ids)[0]
    dtype = next(unet.parameters()).dtype
    output = unet(noisy_latents.to(dtype), part.timesteps, states.to(dtype)).sample
    return (weights * (output.float() - target).square().mean(dim=(1, 2, 3))).sum()


def training_step(
    components: Components,
    optimizer: torch.optim.Optimizer,
    draw: StepDraw,
    config: TrainConfig,
    step: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """One update of the LoRA matrices; returns loss, lr, grad_norm (before clipping) and mean_timestep.

    Raises TrainingError, and changes no weight, when the loss or its gradient is not a number.
    """
    device = components.device
    for part in trained_parts(components, config).values():
        if not part.training:  # to ask is cheap, to tell every module is not
            part.train()
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=device)
    for number, micro_batch in own_parts(draw, config, accelerator):
        with seeded(config.seed, f"LoRA dropout of part {number}", step, device), accelerator.autocast():
            # Divided by the whole batch: the parts then add up to its mean, however it was cut
            own_loss = part_loss(components, micro_batch.to(device), config) / len(draw)
        accelerator.backward(own_loss)
        loss += own_loss.detach()

    # A list: a generator that was used up before would clip nothing
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss = sum_over_processes(loss, parameters, accelerator)
    grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
    loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # the one place where results are read back
    check_finite(loss, grad_norm, draw, step, accelerator)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step) * group.get("ratio", 1.0)  # LoRA+ gives B a ratio
    optimizer.step()
    mean_timestep = draw.timesteps.float().mean().item()
    return {"loss": loss, "lr": learning_rate(config, step), "grad_norm": grad_norm, "mean_timestep": mean_timestep}


def check_finite(loss: float, grad_norm: float, draw: StepDraw, step: int, accelerator: Accelerator) -> None:
    """Raises TrainingError, with what led to it, when the loss or the norm of its gradient is not a number.

    In fp16 a gradient may overflow: the scaler then skips the step and halves the loss's scale, and all is well
    unless the scale has no room left.
    """
    scaler = accelerator.scaler
    has_room = scaler is not None and scaler.get_scale() > SMALLEST_SCALE
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or has_room):
        raise TrainingError(
            f"step {step}: the loss is {loss} and its gradient's norm {grad_norm}; timesteps "
            f"{draw.timesteps.tolist()}, rows {draw.indices.tolist()}. The last checkpoint is kept."
        )


# --- the moving average ------------------------------------------------------------------------------------------
# A smoother adapter than the last step's (EMA): m = d m + (1 - d) w after each step, where d grows towards the decay,
# so that the first steps are soon forgotten. It lies with AdamW's moments, so that checkpoints keep it.
# (Polyak and Juditsky 1992, SIAM J. Control Optim. 30; as diffusers' EMAModel does it.)
AVERAGE = "average"  # its name among the states of a parameter


def states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
    """(parameter, what the optimizer keeps of it) of each parameter that took a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state.get(parameter):
                yield parameter, optimizer.state[parameter]


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Take the weights after step `step` (from 0) into the average. decay: from 0 (no average) to below 1."""
    d = min(decay, (1 + step) / (10 + step))
    for parameter, state in states(optimizer):
        # m = d m + (1 - d) w
        state.setdefault(AVERAGE, parameter.detach().clone()).lerp_(parameter, 1 - d)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the weights are their average, where there is one; afterwards they are what they were."""
    having = [(parameter, state) for parameter, state in states(optimizer) if AVERAGE in state]
    kept = [(parameter, parameter.detach().clone(), state) for parameter, state in having]
    with torch.no_grad():
        for parameter, _, state in kept:
            parameter.copy_(state[AVERAGE])
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight, _ in kept:
                parameter.copy_(weight)
