"""What `benchmarks.gpu` measures at one point: training by the course or as stock scripts do, sampling, a memory rung.

Each function takes a point, the model and a `Bench`, and returns what the record holds of it.

- The course: its own loop, latents and text states from a cache, U-Net in half precision, VAE and text encoder in
  float32, A and B in float32, with torch.compile where the settings say so.
- Stock: what diffusers' train_text_to_image_lora.py does, which has everything but A and B in half precision.
"""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from torch import Tensor

from benchmarks.gpu_model import build_model, random_pixels, step_operations
from benchmarks.gpu_ways import FREE_MEMORY, pictures_at_once, within
from benchmarks.loops import CourseLoop, StockLoop, preset_loop
from benchmarks.pair import BATCHES, adapt, random_cache
from benchmarks.timing import Stopwatch, Trains, compare, time_in_turn
from helpers import lora
from helpers.diffusion.components import Components, as_pipeline
from helpers.diffusion.pictures import to_latents, to_pictures
from helpers.diffusion.sampling import initial_latents, sample
from helpers.diffusion.text import encode_prompts, encode_tokens, tokenize
from helpers.presets.configuration import Preset
from helpers.training import loop as training
from helpers.training.draws import seeded
from helpers.training.steps import new_accelerator

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
ENCODED = 16  # pictures, and captions, whose encoding is timed at once


@dataclass(frozen=True)
class Settings:
    """What a measurement depends on besides the device.

    model: "sd21-base", or "tiny" to try the benchmark itself. minutes: after so many nothing new is begun.
    rounds: blocks timed at a training point, of `steps` steps each, after `warmup` steps; rung_rounds: likewise for a
    memory rung. drawings: times that each side draws its pictures, of `sampling_steps` steps each. matrix: rows of the
    square matrices whose product is the ceiling.
    """

    model: str = "sd21-base"
    minutes: float = 8.0
    rounds: int = 5
    steps: int = 4
    warmup: int = 3
    rung_rounds: int = 2
    drawings: int = 3
    sampling_steps: int = 25
    matrix: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "warmup", "rung_rounds", "drawings", "sampling_steps", "matrix", "minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class Point:
    """One thing to be measured. kind: a key of `KINDS`. preset: its settings; `batch` pictures are drawn at once.

    ways: of `benchmarks.gpu_ways`, in which the course does not work and might.
    """

    name: str
    kind: str
    preset: Preset
    batch: int = 0
    ways: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        return self.preset.train.mixed_precision


class Meter:
    """The most memory that PyTorch held on a CUDA device since the last reset; a CPU tells nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what earlier points left reserved is none of this one's
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> dict[str, int]:
        """Bytes: "peak_allocated" that tensors took, and "peak_reserved" that the allocator held for them."""
        if self.device.type != "cuda":
            return {}
        allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
        return {"peak_allocated": allocated(self.device), "peak_reserved": reserved(self.device)}


class Models:
    """The model of a point. One is held at a time, so that no point's memory holds another's."""

    def __init__(self, size: str, device: torch.device) -> None:
        self.size, self.device = size, device
        self.key: tuple[str, bool] | None = None
        self.model: Components | None = None

    def get(self, point: Point) -> Components:
        key = point.precision, point.kind == "stock"
        if key != self.key:
            self.drop()
            half = HALF[point.precision]
            self.model = build_model(self.size, self.device, half, half if key[1] else torch.float32)
            self.key = key
        return self.model

    def drop(self) -> None:
        self.key = self.model = None
        gc.collect()


@dataclass(frozen=True)
class Bench:
    """What the points of one run share."""

    settings: Settings
    device: torch.device
    meter: Meter


@dataclass(frozen=True)
class Repeats:
    """Something that is timed as if it were training: one call is one step."""

    call: Callable[[], object]

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.call()


# --- the ceiling -------------------------------------------------------------------------------------------------


def matmul_ceiling(bench: Bench, dtype: torch.dtype) -> float:
    """Operations a second of a large product of random square matrices: the fastest of some blocks."""
    n = bench.settings.matrix
    a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
    seconds = time_in_turn({"": Repeats(lambda: a @ b)}, 5, 20, 5, bench.device)[""]
    # an n x n product is n^2 sums of n products
    return 2 * n**3 / min(seconds)


# --- training ----------------------------------------------------------------------------------------------------


@contextmanager
def course_side(point: Point, model: Components, seed: int) -> Iterator[CourseLoop]:
    """The course's loop on random latents, compiled if the settings say so, in the point's ways."""
    cache = random_cache(model, BATCHES * point.preset.train.batch_size, seed)
    with tempfile.TemporaryDirectory() as folder, preset_loop(point.preset, cache, Path(folder), model) as course:
        with training.training_forward(course.loop) as forward, within(point.ways, model, HALF[point.precision]):
            yield replace(course, loop=forward)


@dataclass
class HalfStockLoop(StockLoop):
    """The stock loop in half precision, with the accelerate of the stock script. A and B are float32."""

    accelerator: Accelerator | None = None

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        return super().encode_pictures(pixels.to(self.components.vae.dtype))

    def loss(self, latents: Tensor, states: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return super().loss(latents, states)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self) -> None:
        self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)


@contextmanager
def stock_side(point: Point, model: Components, seed: int) -> Iterator[HalfStockLoop]:
    """The stock loop on random pixels that wait on the CPU: decoding pictures is not measured. PEFT goes at the end."""
    config = point.preset.train
    pixels = random_pixels(model, BATCHES * config.batch_size, seed).split(config.batch_size)
    ids = tokenize(model, ["a caption"] * config.batch_size)
    with seeded(config.seed, "init", 0, model.device):
        adapt("peft", model.unet, config)
    cast_training_params(model.unet, dtype=torch.float32)
    parameters = [p for p in model.unet.train().parameters() if p.requires_grad]
    own = {"betas": config.betas, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, **own)
    schedule = get_scheduler("constant", optimizer)
    accelerator = new_accelerator(config, model.device)
    batches = [(batch, ids) for batch in pixels]
    prepared = accelerator.prepare_optimizer(optimizer)
    try:
        yield HalfStockLoop(model, config, batches, parameters, prepared, schedule, accelerator=accelerator)
    finally:
        accelerator.free_memory()
        model.unet.unload_lora()
        model.unet.eval()


def timed_steps(bench: Bench, side: Trains, rounds: int) -> dict:
    """Seconds of a step, and the peak of all of them; the first steps are only warm-up (and compile)."""
    settings, watch = bench.settings, Stopwatch(bench.device)
    bench.meter.reset()
    began = watch.now()
    side.train(settings.warmup)
    warmup = watch.now() - began
    blocks = time_in_turn({"": side}, rounds, settings.steps, 0, bench.device)[""]
    return {"step_seconds": statistics.median(blocks), "blocks": blocks, "warmup_seconds": warmup, **bench.meter.read()}


def measure_training(point: Point, model: Components, bench: Bench) -> dict:
    """Time, rate and memory of training steps; see `timed_steps`."""
    side = stock_side if point.kind == "stock" else course_side
    with side(point, model, bench.settings.seed) as loop:
        found = timed_steps(bench, loop, bench.settings.rounds)
    work = step_operations(bench.settings.model, point.preset.train, point.kind == "stock")
    rates = {
        "pictures_per_second": point.preset.train.batch_size / found["step_seconds"],
        "operations_per_second": work / found["step_seconds"],
    }
    return {"operations": work, **rates, **found}


def measure_rung(point: Point, model: Components, bench: Bench) -> dict:
    """Peak memory and time of training steps, and then of a validation as in a run: pictures drawn, decoded, saved."""
    with course_side(point, model, bench.settings.seed) as course:
        trained = timed_steps(bench, course, bench.settings.rung_rounds)
        bench.meter.reset()
        watch = Stopwatch(bench.device)
        began = watch.now()
        with course.loop.accelerator.autocast():
            training.validate(course.loop, course.step, course.progress.tracker)
        validated = {"seconds": watch.now() - began, "pictures": len(course.loop.prompts), **bench.meter.read()}
    return {"training": trained, "validation": validated}


# --- pictures ----------------------------------------------------------------------------------------------------


def drawing_sides(point: Point, model: Components, settings: Settings) -> dict[str, Repeats]:
    """The course's sampler and diffusers' pipeline, from prompts to pictures float [B, 3, H, W] in 0..1.

    They share the U-Net, without an adapter, and start from the same noise. The pipeline has its VAE and its text
    encoder in the U-Net's precision, as its users load it; the course in float32. Neither knows the other's parts.
    """
    prompts, latents = ["a drawing"] * point.batch, initial_latents(model, range(point.batch))
    steps, guidance = settings.sampling_steps, point.preset.guidance_scale
    dtype = next(model.unet.parameters()).dtype
    own = {part: copy.deepcopy(getattr(model, part)) for part in ("vae", "text_encoder")}
    half = replace(model, **{part: torch.nn.Module.to(module, dtype) for part, module in own.items()})
    pipeline = as_pipeline(half)

    def ours() -> Tensor:
        return to_pictures(model, sample(model, prompts, latents, steps, guidance, batch_size=point.batch))

    def stock() -> Tensor:
        # Without its tokenizer the pipeline takes the text encoder's output, computed here in its place
        texts = {"prompt_embeds": encode_prompts(half, prompts)}
        texts["negative_prompt_embeds"] = encode_prompts(half, [""] * point.batch)
        numbers = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        return pipeline(**texts, latents=latents.to(dtype), **numbers).images

    return {"ours": Repeats(ours), "stock": Repeats(stock)}


def measure_sampling(point: Point, model: Components, bench: Bench) -> dict:
    """Pictures a second of both samplers, in turn, and the peak of each."""
    model.unet.eval()
    return time_drawing(drawing_sides(point, model, bench.settings), point.batch, bench)


def time_drawing(sides: dict[str, Repeats], pictures: int, bench: Bench) -> dict:
    """Pictures a second of two sides that draw so many, in turn, their ratio, and the peak of each."""
    peaks = {}
    for name, side in sides.items():
        bench.meter.reset()
        side.train(1)
        peaks[name] = bench.meter.read()
    seconds = time_in_turn(sides, bench.settings.drawings, 1, 0, bench.device)
    rates = {name: [pictures / block for block in blocks] for name, blocks in seconds.items()}
    return {**compare(rates, *sides), "peaks": peaks}


@contextmanager
def adapter_for_drawing(point: Point, model: Components, seed: int) -> Iterator[None]:
    """Within the block the U-Net has an adapter as a finished run leaves it: B is not zero any more."""
    config = point.preset.train
    with seeded(seed, "adapter", 0, model.device):
        adapt("ours", model.unet, config)
        for layer in lora.lora_layers(model.unet).values():
            torch.nn.init.normal_(layer.lora_B.weight, std=0.01)
    try:
        yield
    finally:
        lora.remove(model.unet)


def adapted_sides(point: Point, model: Components, settings: Settings) -> dict[str, Repeats]:
    """Drawing `batch` pictures with an adapter in the point's ways, and as the course does."""
    prompts, latents = ["a drawing"] * point.batch, initial_latents(model, range(point.batch))
    steps, guidance = settings.sampling_steps, point.preset.guidance_scale
    at_once = pictures_at_once(model, point.batch) if FREE_MEMORY in point.ways else None

    def draw(batch_size: int | None = None) -> Tensor:
        return to_pictures(model, sample(model, prompts, latents, steps, guidance, batch_size=batch_size))

    def in_ways() -> Tensor:
        with within(point.ways, model, HALF[point.precision]):
            return draw(at_once)

    return {"way": Repeats(in_ways), "course": Repeats(draw)}


def measure_drawing(point: Point, model: Components, bench: Bench) -> dict:
    """Pictures a second with an adapter in other ways and as the course draws, in turn, and the peak of each."""
    model.unet.eval()
    with adapter_for_drawing(point, model, bench.settings.seed):
        return time_drawing(adapted_sides(point, model, bench.settings), point.batch, bench)


def measure_encoding(point: Point, model: Components, bench: Bench) -> dict:
    """What the cache costs: seconds for the latents of one picture and the text states of one caption."""
    pixels = random_pixels(model, ENCODED, bench.settings.seed)
    ids = tokenize(model, ["a caption"] * ENCODED)
    bench.meter.reset()
    side = Repeats(lambda: (to_latents(model, pixels), encode_tokens(model, ids)))
    seconds = time_in_turn({"": side}, bench.settings.drawings, 1, 1, bench.device)[""]
    return {"seconds_per_picture": statistics.median(seconds) / ENCODED, **bench.meter.read()}


# --- all of them -------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Point, Components, Bench], dict]] = {
    "training": measure_training,
    "stock": measure_training,
    "compile": measure_training,
    "rung": measure_rung,
    "sampling": measure_sampling,
    "drawing": measure_drawing,
    "encoding": measure_encoding,
}
