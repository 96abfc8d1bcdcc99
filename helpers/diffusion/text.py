"""Prompts to token ids to text embeddings."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from helpers.diffusion.components import CHUNK, Components, in_own_precision


def tokenize(components: Components, prompts: list[str]) -> Tensor:
    """Token ids int64 [B, L], padded to the text encoder's L positions.

    Longer prompts are cut at the end, and one warning says how many.
    """
    length = components.text_encoder.config.max_position_embeddings
    whole = components.tokenizer(prompts, verbose=False).input_ids
    cut = sum(len(ids) > length for ids in whole)
    if cut:
        warnings.warn(f"{cut} of {len(prompts)} prompts are longer than {length} tokens and were cut", stacklevel=3)
    fixed = {"padding": "max_length", "max_length": length, "truncation": True}
    return components.tokenizer(prompts, **fixed, return_tensors="pt").input_ids


@torch.no_grad()
def encode_prompts(components: Components, prompts: list[str]) -> Tensor:
    """Text embeddings [B, L, D] (`encoder_hidden_states`) of B prompts, L tokens each. "" is the unconditional one."""
    if not prompts:
        raise ValueError("there are no prompts to encode")
    return encode_tokens(components, tokenize(components, list(prompts)))


@torch.no_grad()
def encode_tokens(components: Components, input_ids: Tensor) -> Tensor:
    """Text embeddings [B, L, D] of token ids int64 [B, L]."""
    chunks = input_ids.to(components.device).split(CHUNK)
    with in_own_precision(components):
        return torch.cat([components.text_encoder(chunk)[0] for chunk in chunks])
