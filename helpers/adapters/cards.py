"""What an adapter file says about itself: `inspect` for people at a prompt, a model card for the hub.

The card is the README.md that the Hugging Face hub shows for a model: metadata in YAML, then text.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from helpers.adapters.configuration import COMPONENTS, Adapter
from helpers.adapters.reading import adapter_file, read_adapter
from helpers.base.files import atomic_path

CARD_NAME = "README.md"
BLOCK = re.compile(r"unet\.(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)|text_encoder\.encoder\.layers\.\d+")


@dataclass(frozen=True)
class AdapterInfo:
    """What is in an adapter file.

    layout: "diffusers", "kohya", "peft", "ldm" or "old". size: of the file, bytes. parameters: trained numbers.
    ranks, alphas: {value: number of layers}. targets: {component: what it adapts}. norms: {block: Frobenius norm of its
    update}, which tells where the adapter acts. metadata: its provenance.
    """

    path: Path
    layout: str
    size: int
    parameters: int
    layers: int
    ranks: dict[int, int]
    alphas: dict[float, int]
    use_rslora: bool
    use_dora: bool
    targets: dict[str, list[str] | str]
    norms: dict[str, float]
    metadata: dict
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = "DoRA" if self.use_dora else "rank-stabilised LoRA" if self.use_rslora else "LoRA"
        lines = [
            f"{self.path.name}: {kind}, {self.layout} layout, {self.size:,} bytes, {self.parameters:,} parameters",
            f"  layers   {self.layers}",
            f"  rank     {counted(self.ranks)}",
            f"  alpha    {counted(self.alphas)}",
        ]
        for component, targets in self.targets.items():
            lines.append(f"  targets  {component}: {targets if isinstance(targets, str) else ', '.join(targets)}")
        longest = max(self.norms.values())
        for block, norm in self.norms.items():
            bar = "#" * round(30 * norm / longest) if longest else ""
            lines.append(f"  norm     {block:32} {norm:9.4f}  {bar}")
        for key, value in self.metadata.items():
            lines.append(f"  {key:16} {value}")
        lines += [f"  note     {note}" for note in self.notes]
        return "\n".join(lines)


def counted(values: dict) -> str:
    """16, or "16 (30 layers), 4 (2 layers)"."""
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count} layers)" for value, count in values.items())


def inspect(path: str | os.PathLike) -> AdapterInfo:
    """Read an adapter's file or folder and say what is in it. Raises AdapterError as `read_adapter`."""
    path = adapter_file(path)
    adapter = read_adapter(path)
    weights = adapter.layers.values()
    return AdapterInfo(
        path=path,
        layout=adapter.layout,
        size=path.stat().st_size,
        parameters=sum(tensor.numel() for w in weights for tensor in w.tensors().values()),
        layers=len(adapter.layers),
        ranks=dict(Counter(w.rank for w in weights).most_common()),
        alphas=dict(Counter(w.alpha for w in weights).most_common()),
        use_rslora=any(w.use_rslora for w in weights),
        use_dora=any(w.magnitude is not None for w in weights),
        targets={c: adapter.targets.get(c) or leaves(adapter, c) for c in COMPONENTS if adapter.of(c)},
        norms=block_norms(adapter),
        metadata=adapter.metadata,
        notes=adapter.notes,
    )


def leaves(adapter: Adapter, component: str) -> list[str]:
    """The ends of the adapted modules' names, for a file that does not name its targets: ["to_out.0", "to_q"]."""
    ends = {name: re.search(r"[^.\d][^.]*(\.\d+)?$", name) for name in adapter.of(component)}
    return sorted({end[0] if end else name for name, end in ends.items()})


def block_norms(adapter: Adapter) -> dict[str, float]:
    """{block: Frobenius norm of the update of all its layers}, in the file's order; DoRA's magnitudes are left out."""
    squares: dict[str, float] = defaultdict(float)
    for layer, weights in adapter.layers.items():
        block = BLOCK.match(layer)
        # the squared norm of a whole is the sum of those of its parts
        squares[block[0] if block else ".".join(layer.split(".")[:2])] += weights.norm() ** 2
    return {block: math.sqrt(square) for block, square in squares.items()}


# ---- the card ----
def write_card(path: str | os.PathLike) -> Path:
    """Write a model card beside an adapter's file, from what the file says; returns the card's path.

    Raises AdapterError as `read_adapter`.
    """
    card = adapter_file(path).parent / CARD_NAME
    with atomic_path(card) as unfinished:
        unfinished.write_text(model_card(inspect(path)), encoding="utf-8", newline="\n")
    return card


def model_card(info: AdapterInfo) -> str:
    """The text of the card: YAML for the hub, how to use the adapter, and where it comes from."""
    said = info.metadata
    base = text_of(said.get("base_model", "an unnamed model"))
    dataset = text_of(said.get("dataset", "unnamed pictures"))
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "lora", "text-to-image", "stable-diffusion", "template:sd-lora"],
    )
    facts = {
        "base model": base,
        "dataset": dataset,
        "rank": counted(info.ranks),
        "alpha": counted(info.alphas),
        "targets": "; ".join(f"{c}: {t if isinstance(t, str) else ', '.join(t)}" for c, t in info.targets.items()),
        "parameters": f"{info.parameters:,}",
        **{key.replace("_", " "): text_of(value) for key, value in said.items() if key not in SHOWN},
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    usage = HUB_USAGE if on_hub else LOCAL_USAGE
    return CARD.format(
        yaml=data.to_yaml().strip(),
        title=f"LoRA: {dataset} for {base}",
        usage=usage.format(base=base, file=info.path.name),
        rows=rows,
    )


SHOWN = ("base_model", "dataset", "rank", "alpha", "targets")


def text_of(value: object) -> str:
    """A metadata value on one line that does not break a table."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {v}" for key, v in value.items())
    return " ".join(str(value).replace("|", "/").split())


CARD = """---
{yaml}
---

# {title}

A low-rank adapter (Hu et al. 2021, arXiv 2106.09685) for a latent diffusion model, trained by a loop written by hand.

## Use

{usage}
## What it is

| | |
| --- | --- |
{rows}

## Before you share it

State the licence of the pictures it was trained on, and of the base model. It draws what those pictures show, with
their biases, and it has been tried on prompts like their captions only.
"""
HUB_USAGE = """```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights(".", weight_name="{file}")
picture = pipeline("a prompt").images[0]
```
"""
LOCAL_USAGE = """The base model, {base}, is not on the hub. In the repository that trained the adapter,
with the name of its preset:

```python
from helpers.adapters import load_adapter
from helpers.diffusion import generate, load_components
from helpers.presets import get_preset

components = load_components(get_preset("mini"))
load_adapter("{file}", components.unet, components.text_encoder)
picture = generate(components, ["a prompt"], seeds=[0])[0]
```
"""
