"""Judging pictures by their features: one interface for MiniSD and for real Stable Diffusion.

An encoder turns pictures into features, rows of length 1 that `helpers.evaluation.distances` compares, and says how
well a picture fits its prompt. On the drawn world it is the classifier that ships with MiniSD; on photographs and real
pictures it is CLIP. Numbers of two encoders are on different scales: never compare them, and name the encoder beside
each.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from helpers.base import hub
from helpers.base.device import default_device
from helpers.diffusion.components import Components, ComponentsError, quiet_transformers
from helpers.diffusion.pictures import to_rgb
from helpers.evaluation.classifier import Classifier, load_classifier
from helpers.evaluation.measures import SCORED, Verdict, content_counts, judge
from helpers.presets.catalogue import CLIP, CLIP_GB

try:  # the same numbers whether torchvision is installed or not
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:  # transformers 4, whose CLIPImageProcessor is this one
    from transformers import CLIPImageProcessor

CLIP_NEEDED: tuple[str, ...] = ("config.json", "model.safetensors", "preprocessor_config.json")
CLIP_NEEDED += ("vocab.json|tokenizer.json", "merges.txt|tokenizer.json")
CLIP_FILES = ("*.json", "merges.txt", "model.safetensors")  # what is downloaded; no pickle
CHUNK = 32  # pictures or prompts that go through CLIP at once
SIZES = {768: "B", 1024: "L", 1280: "H"}  # what vision transformers of these widths are called


class PictureEncoder(Protocol):
    """What distances between sets of pictures need: features. name: what figures and results call the encoder."""

    name: str

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features float32 [N, D] of N pictures, each row of length 1, on the CPU. ValueError for no pictures."""
        ...


class Encoder(PictureEncoder, Protocol):
    """One that also knows what a prompt asks for. (`helpers.evaluation.imagenet` is one that does not.)"""

    def adherence(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """How well each of N pictures fits its prompt, [N]; more is better. ValueError unless there are N prompts."""
        ...


def unit_rows(x: Tensor) -> Tensor:
    """The rows of x [N, D] divided by their lengths, float32 on the CPU.

    Raises ValueError for a row that has no direction: all zeros, or not finite.
    """
    x = x.detach().float().cpu()
    lengths = x.norm(dim=1, keepdim=True)
    if not (lengths.isfinite() & (lengths > 0)).all():
        raise ValueError("the features of a picture or prompt are zero or not finite")
    return x / lengths


def check_pairs(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Raises ValueError unless there is one prompt for each picture, and at least one picture."""
    if isinstance(prompts, str) or len(pictures) != len(prompts):
        count = 1 if isinstance(prompts, str) else len(prompts)
        raise ValueError(f"{len(pictures)} pictures need a list of as many prompts, not {count}")
    if not pictures:
        raise ValueError("there are no pictures to judge")


# --- CLIP -------------------------------------------------------------------------------------------------------------
class ClipEncoder:
    """CLIP (Radford et al. 2021, arXiv 2103.00020): pictures and prompts in one space, learnt from captions of the web.

    Prompts and pictures go through it CHUNK at a time; the answers do not depend on it beyond rounding. Between two
    questions the model lies in main memory, since the GPU's is needed to draw the pictures.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        processor: CLIPImageProcessor,
        name: str,
        device: str | torch.device = "cpu",
    ):
        self.model, self.tokenizer, self.processor, self.name = model, tokenizer, processor, name
        self.device = torch.device(device)

    @classmethod
    def load(
        cls, folder: str | os.PathLike, device: str | torch.device | None = None, name: str | None = None
    ) -> ClipEncoder:
        """From a local folder in transformers layout, as float32, to compute on `device` (default: the best).

        It holds config.json, model.safetensors, preprocessor_config.json, and the tokenizer: tokenizer.json, or
        vocab.json with merges.txt. Nothing is downloaded, and no pickle is read.
        name: by default made from the configuration, such as "CLIP ViT-L/14"; say which training it is if not OpenAI's.
        Raises ComponentsError when a file is missing or damaged, or the tokenizer is not the model's.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():  # without one transformers builds the model of its paper
            raise ComponentsError(f"there is no CLIP in {folder}: it has no config.json; download it first")
        local = {"local_files_only": True}
        try:
            with quiet_transformers():
                model, report = CLIPModel.from_pretrained(
                    folder, use_safetensors=True, output_loading_info=True, **local
                )
            tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
            processor = CLIPImageProcessor.from_pretrained(folder, **local)
        except Exception as error:  # OSError, SafetensorError, json's: all mean that the folder is unusable
            raise ComponentsError(f"cannot read CLIP from {folder}: {error}") from error
        if report["missing_keys"]:
            raise ComponentsError(f"{folder} lacks these weights: {', '.join(sorted(report['missing_keys']))}")
        # Without its files transformers builds a tokenizer of two special tokens and says nothing.
        if len(tokenizer) != model.config.text_config.vocab_size:
            known = model.config.text_config.vocab_size
            raise ComponentsError(f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model knows {known}")
        model = model.float().eval().requires_grad_(False)
        return cls(model, tokenizer, processor, name or clip_name(model), device or default_device())

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """CLIP's picture embeddings float32 [N, D], each of length 1, on the CPU.

        Any mode and size: turned as the EXIF tag says, laid on white where transparent, the shorter side scaled to
        CLIP's own (224 pixels in most) with bicubic interpolation, and cropped to the centre square.
        Raises ValueError for no pictures.
        """
        if not pictures:
            raise ValueError("there are no pictures to judge")
        return self._encode(self._picture_chunk, pictures)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's text embeddings float32 [N, D], each of length 1, on the CPU.

        Prompts of more tokens than CLIP has positions (77, of which two mark start and end) are cut, and one warning
        says how many. Raises ValueError for no prompts.
        """
        if not prompts:
            raise ValueError("there are no prompts to encode")
        length = self.model.config.text_config.max_position_embeddings
        cut = sum(len(ids) > length for ids in self.tokenizer(list(prompts), verbose=False).input_ids)
        if cut:
            warnings.warn(f"{cut} of {len(prompts)} prompts are longer than {length} tokens and were cut", stacklevel=2)
        return self._encode(self._text_chunk, prompts)

    def adherence(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """100 times the cosine of each picture's embedding and its prompt's, float64 [N].

        That is CLIPScore (Hessel et al. 2021, arXiv 2104.08718, equation 1: 2.5 max(cos, 0)) without its factor 2.5 and
        without the clipping at 0. Nor is "A photo depicts" put before the prompt, as theirs does for captions.
        Raises ValueError unless there is one prompt for each picture.
        """
        check_pairs(pictures, prompts)
        # 100 cos(E_I, E_T), of rows of length 1
        images, texts = self.pictures(pictures).cpu().double(), self.texts(prompts).cpu().double()
        return 100 * (images * texts).sum(1).numpy()

    @torch.no_grad()
    def _encode(self, encode, items: Sequence) -> Tensor:
        """Rows of length 1 [N, D] for N items; `encode` turns up to CHUNK of them into [n, D]."""
        self.model.to(self.device)
        try:
            chunks = [encode(items[start : start + CHUNK]) for start in range(0, len(items), CHUNK)]
        finally:
            self.model.cpu()
        return unit_rows(torch.cat(chunks))

    def _picture_chunk(self, pictures: Sequence[Image.Image]) -> Tensor:
        upright = [to_rgb(ImageOps.exif_transpose(picture)) for picture in pictures]
        pixels = self.processor(images=upright, return_tensors="pt")["pixel_values"]
        return _embedding(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    def _text_chunk(self, prompts: Sequence[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        masked = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return _embedding(self.model.get_text_features(**masked))


def _embedding(output) -> Tensor:
    """The embeddings [B, D] in what CLIP returns: a tensor in transformers 4, an object that holds it in 5."""
    return output if isinstance(output, Tensor) else output.pooler_output


def clip_name(model: CLIPModel) -> str:
    """What papers call a CLIP model: "CLIP ViT-L/14", or "CLIP ViT-L/14@336px" where the side is not 224."""
    vision = model.config.vision_config
    side = "" if vision.image_size == 224 else f"@{vision.image_size}px"
    return f"CLIP ViT-{SIZES.get(vision.hidden_size, vision.hidden_size)}/{vision.patch_size}{side}"


# --- the drawn world --------------------------------------------------------------------------------------------------
class WorldEncoder:
    """The classifier that ships with MiniSD: what it sees before it names anything, and whether the prompt named it.

    style: the one the pictures are drawn in, which decides which attributes can be seen (`evaluation.SCORED`).
    Raises ValueError for an unknown style.
    """

    name = "drawn-world classifier"

    def __init__(self, style: str, classifier: Classifier | None = None):
        if style not in SCORED:
            raise ValueError(f"unknown style {style!r}; known: {', '.join(SCORED)}")
        self.style, self.classifier = style, classifier or load_classifier()

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The activations that the classifier's heads share, float32 [N, 192], each row divided by its length.

        None is negative, so that cosines lie in 0..1. Raises ValueError for no pictures.
        """
        if not pictures:
            raise ValueError("there are no pictures to judge")
        out = torch.empty(len(pictures), self.classifier.shared.out_features)
        for rows in same_side(pictures):
            out[rows] = self._look([pictures[i] for i in rows])[1]
        return unit_rows(out)

    def adherence(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Share [N] of the attributes that each prompt names, and the style shows, which the classifier sees.

        Raises ValueError unless there is one prompt for each picture, and for prompts that name none.
        """
        check_pairs(pictures, prompts)
        out = np.empty(len(pictures))
        for rows in same_side(pictures):
            verdict, _ = self._look([pictures[i] for i in rows])
            texts = [prompts[i] for i in rows]
            counts = content_counts(texts, verdict, self.style)
            for row, text, (right, named) in zip(rows, texts, counts, strict=True):
                if not named:
                    raise ValueError(f"the prompt {text!r} names nothing that can be seen in style {self.style!r}")
                out[row] = right / named
        return out

    def _look(self, pictures: Sequence[Image.Image]) -> tuple[Verdict, Tensor]:
        """The judge's verdict on n pictures of one size, and the inputs [n, 192] of the classifier's heads."""
        seen: list[Tensor] = []
        hook = self.classifier.heads["style"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            verdict = judge(pictures, self.classifier)
        finally:
            hook.remove()
        return verdict, torch.cat(seen)


def same_side(pictures: Sequence[Image.Image]) -> list[list[int]]:
    """Rows of the pictures, those of equally long shorter sides together.

    `judge` brings all it is given to the smallest one's size. A picture's features should not depend on its company.
    """
    sides = [min(picture.size) for picture in pictures]
    return [[i for i, other in enumerate(sides) if other == side] for side in sorted(set(sides))]


# --- which one ------------------------------------------------------------------------------------------------------
def load_encoder(components: Components, style: str) -> Encoder:
    """The judge of a model's pictures: the drawn world's classifier for MiniSD, else CLIP, downloaded if need be.

    style: of the drawn world, for MiniSD. Raises HubError or ComponentsError when CLIP cannot be had, and ValueError
    for an unknown style.
    """
    if components.is_minisd:
        return WorldEncoder(style)
    found = hub.fetch("CLIP, which judges the pictures", CLIP, "model", CLIP_FILES, CLIP_NEEDED, CLIP_GB)
    return _clip(found.folder, components.device)


@lru_cache(maxsize=1)
def _clip(folder: Path, device: torch.device) -> ClipEncoder:
    return ClipEncoder.load(folder, device)
