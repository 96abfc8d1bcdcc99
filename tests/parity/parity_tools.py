"""What the parity tests share: models, adapters of both makes, training steps, and the largest difference."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import torch
from peft import LoraConfig
from tiny import tiny_components, tiny_sd15_unet, tiny_sd21_unet
from torch import Tensor
from torch.nn import functional as F

from helpers import lora
from helpers.adapters.loading import load_adapter
from helpers.diffusion.components import as_pipeline, load_components
from helpers.lora import dora
from helpers.presets.variants import get_preset

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv_in", "conv_shortcut", "conv"]
TARGETS = [*ATTENTION, "proj_in", *CONVOLUTIONS]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
ALPHA = 6.0  # the alpha of every adapter that does not say another; no tested rank equals it
TINY = ["SD 1.5", "SD 2.1"]
STRUCTURES = [*TINY, "MiniSD"]


ROUNDING = 1e-6
# kohya keeps alpha as a float32: where that rounds, a whole U-Net makes about 1e-6 of it
UNET_ROUNDING = 5e-6
# and a few denoising steps with guidance make about 1e-5 of that
LATENTS_ROUNDING = 5e-5


# ---- models ----


@cache
def components_of(structure):
    """The parts of a model, built or read once; copy what you change."""
    if structure == "MiniSD":
        return load_components(get_preset("mini"), "cpu")
    return tiny_components({"SD 1.5": tiny_sd15_unet, "SD 2.1": tiny_sd21_unet}[structure]())


def unet_of(structure):
    """A U-Net of its own, frozen, in evaluation mode; the same weights each time.

    PyTorch multiplies by a frozen weight in another order than by a trainable one, so frozen is what compares exactly.
    """
    return deepcopy(components_of(structure).unet).requires_grad_(False)


def text_encoder_of(structure="SD 1.5"):
    """A text encoder of its own, frozen, in evaluation mode; the same weights each time."""
    return deepcopy(components_of(structure).text_encoder).requires_grad_(False)


def pipeline_of(structure):
    """diffusers' pipeline with a U-Net and a text encoder of its own."""
    parts = components_of(structure)
    return as_pipeline(replace(parts, unet=unet_of(structure), text_encoder=text_encoder_of(structure)))


def loaded_by_us(structure, path):
    """A pipeline with the adapter of a file, read by `load_adapter`."""
    pipeline = pipeline_of(structure)
    load_adapter(path, pipeline.unet, pipeline.text_encoder)
    return pipeline


def loaded_by_diffusers(structure, path):
    """A pipeline with the adapter of a file, read by diffusers."""
    pipeline = pipeline_of(structure)
    pipeline.load_lora_weights(path)
    return pipeline


# ---- adapters ----


def peft_config(targets, rank=4, alpha=ALPHA, *, init="kaiming", kinds=lora.KINDS, dropout=0.0, **options):
    """PEFT's configuration for what `lora.inject` does with the same arguments."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=dropout,
        init_lora_weights="gaussian" if init == "gaussian" else True,
        use_dora=kinds is dora.KINDS,
        **options,
    )


def pair(build, targets=TARGETS, rank=4, alpha=ALPHA, **options):
    """The same model twice, adapted by us and by PEFT after the same torch.manual_seed, in training mode."""
    ours, theirs = build(), build()
    torch.manual_seed(5)
    lora.inject(ours, targets, rank, alpha, **options)
    torch.manual_seed(5)
    theirs.add_adapter(peft_config(targets, rank, alpha, **options))
    return ours.train(), theirs.train()


def fill(model, size=0.3):
    """Stand in for training, by us or by PEFT: random numbers for B, and for DoRA's magnitudes a random factor."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) if "lora_B" in name or "magnitude" in name else None
        if "lora_B" in name:
            parameter.data.copy_(noise * size)
        elif "magnitude" in name:
            parameter.data.mul_(1 + noise * size)


def fill_size(structure):
    """Small enough that MiniSD's pictures stay pictures."""
    return 0.02 if structure == "MiniSD" else 0.3


def short(name):
    """A parameter's name in PEFT without the name of the adapter: as ours."""
    return name.replace(".default", "")


def kinds_of_layers(model):
    """ "linear, 1x1, 3x3, 3x3 with stride 2": which kinds of layers of this model are adapted."""
    found = set()
    for layer in lora.lora_layers(model).values():
        kernel, stride = getattr(layer.base, "kernel_size", None), getattr(layer.base, "stride", None)
        strided = "" if stride in (None, (1, 1)) else f" with stride {stride[0]}"
        found.add("linear" if kernel is None else f"{kernel[0]}x{kernel[1]}{strided}")
    return ", ".join(sorted(found, key=lambda kind: (kind != "linear", kind)))


# ---- inputs, outputs, training ----


def unet_inputs(unet, seed, batch):
    """Latents, timesteps and text embeddings that fit a U-Net."""
    generator = torch.Generator().manual_seed(seed)
    size = unet.config.sample_size
    latents = torch.randn(batch, 4, size, size, generator=generator)
    states = torch.randn(batch, 5, unet.config.cross_attention_dim, generator=generator)
    return latents, torch.randint(0, 1000, (batch,), generator=generator), states


@torch.no_grad()
def output(model, seed=3):
    """What a U-Net or a text encoder makes of two fixed inputs, in evaluation mode."""
    was_training = model.training
    model.eval()
    if hasattr(model.config, "sample_size"):
        result = model(*unet_inputs(model, seed, batch=2)).sample
    else:
        result = model(token_ids(model, seed, batch=2)).last_hidden_state
    model.train(was_training)
    return result


def token_ids(text_encoder, seed, batch):
    """Random captions, as long as the text encoder reads."""
    generator = torch.Generator().manual_seed(seed)
    config = text_encoder.config
    return torch.randint(0, config.vocab_size, (batch, config.max_position_embeddings), generator=generator)


def loss(model, step):
    """One training step's loss; dropout masks come from the global generator, seeded here."""
    if hasattr(model.config, "sample_size"):
        inputs = unet_inputs(model, 1000 + step, batch=1)
        torch.manual_seed(77 + step)
        found = model(*inputs).sample
    else:
        torch.manual_seed(77 + step)
        found = model(token_ids(model, 1000 + step, batch=2)).last_hidden_state
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(step))
    return F.mse_loss(found, target)


def trainable(model):
    """The parameters that train, by PEFT's names without the adapter's."""
    return {short(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model, steps, **options):
    """AdamW with gradient clipping, as the course trains; the loss of every step."""
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, **({"lr": 1e-2, "weight_decay": 1e-2} | options))
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(value.item())
    return torch.tensor(losses, dtype=torch.float64)


def gradients(model, step=50):
    """The gradient of one more step's loss for every parameter that trains."""
    model.zero_grad()
    loss(model, step).backward()
    return {name: parameter.grad for name, parameter in trainable(model).items()}


@cache
def base_results(structure):
    """Latents and text embeddings without any adapter."""
    pipeline = pipeline_of(structure)
    return draw(pipeline), output(pipeline.text_encoder)


@torch.no_grad()
def draw(pipeline):
    """The latents after two denoising steps with guidance; the captions are random tokens."""
    ids = token_ids(pipeline.text_encoder, 4, batch=2)
    caption, empty = pipeline.text_encoder(ids).last_hidden_state.split(1)
    shape = 1, 4, pipeline.unet.config.sample_size, pipeline.unet.config.sample_size
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    embeddings = {"prompt_embeds": caption, "negative_prompt_embeds": empty, "latents": latents}
    return pipeline(**embeddings, num_inference_steps=2, guidance_scale=3.0, output_type="latent").images


# ---- differences ----


def difference(one, other):
    """max|one - other| of two tensors, or of two dicts of tensors with the same keys; NaN if a number is NaN."""
    if isinstance(one, Tensor):
        one, other = {"": one}, {"": other}
    assert list(one) == list(other), "not the same names in the same order"
    assert one and all(one[key].shape == other[key].shape for key in one), "not the same shapes"
    return torch.stack([(one[key].double() - other[key].double()).abs().max() for key in one]).max().item()


def assert_matters(adapted, base, least=1e-2):
    """A comparison proves nothing where the adapter changes nothing."""
    assert difference(adapted, base) > least, "the adapter does not change the result"
