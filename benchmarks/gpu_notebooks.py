"""Do notebooks 01 to 05 run on a CUDA GPU? `python -m benchmarks.gpu_notebooks`

On MiniSD, and on Stable Diffusion 2.1-base at full size with random weights, which are written here and found through
COURSE_LOCAL. Twenty training steps each, few pictures, no network. What failed, and where, is written after each
notebook, and the notebook as far as it came is kept beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import default_device
from helpers.base.files import write_json_atomic
from helpers.base.paths import ROOT, runs_folder
from helpers.base.provenance import versions
from helpers.course import notebooks
from helpers.presets.catalogue import PRESETS
from helpers.presets.sd_configs import CONFIGS, build_part

sys.path.insert(0, str(ROOT / "tests"))  # where the hub's cache of small models and datasets is built
import hub_cache  # noqa: E402

MODEL = "sd21-base"
STEPS = 20
ONLY = "01,02,03,04,05"
PLACE = "get_preset(PRESET"  # where a notebook reads its preset


@dataclass(frozen=True)
class Side:
    """One model: the preset that the notebooks run with, and what the kernels' environment says besides."""

    preset: str
    environment: dict[str, str]


# --- the model ---------------------------------------------------------------------------------------------------


def write_model(folder: Path, sizes: dict[str, dict], device: torch.device) -> None:
    """Stable Diffusion 2.1-base with random weights in diffusers layout, 5 GB at full size.

    sizes: entries of the configuration that shall be others, by part. Its tokenizer knows a few hundred words.
    """
    torch.manual_seed(0)
    for part in ("unet", "vae", "text_encoder"):
        module = build_part(MODEL, part, "cpu" if part == "vae" else device, **sizes.get(part, {}))
        if part == "vae":
            hub_cache.widen_latents(module)  # a random VAE's are far from the width that training expects
        module.save_pretrained(folder / part)
        del module
    files = hub_cache.tokenizer_files()
    files["scheduler/scheduler_config.json"] = json.dumps(CONFIGS[MODEL]["scheduler"]).encode()
    files["model_index.json"] = json.dumps({"_class_name": "StableDiffusionPipeline"}).encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def sides(work: Path, device: torch.device, tiny: bool) -> dict[str, Callable[[], Side]]:
    """MiniSD, and Stable Diffusion with random weights, which is written when it is asked for.

    tiny: a few thousand weights and pictures of 128 pixels, to try this on a CPU.
    """
    common = notebooks.OFFLINE | {"COURSE_RUNS": str(work / "runs")}

    def stable_diffusion() -> Side:
        sizes = hub_cache.small_sizes(MODEL) if tiny else {}
        sizes.setdefault("text_encoder", {})["vocab_size"] = len(hub_cache.vocabulary())
        write_model(work / "models" / PRESETS[MODEL].model.split("/")[-1], sizes, device)
        hub_cache.build(work / "home")  # for the datasets and CLIP; COURSE_LOCAL comes before it
        places = {"COURSE_LOCAL": str(work / "models"), "HF_HOME": str(work / "home")}
        return Side(f"{MODEL}@trial{'@128px' if tiny else ''}", common | places)

    return {"MiniSD": lambda: Side("smoke", common), MODEL: stable_diffusion}


# --- the notebooks -----------------------------------------------------------------------------------------------


def with_steps(path: Path, folder: Path) -> Path:
    """A copy of a notebook whose preset trains so many steps. Raises ValueError for one that reads no preset."""
    notebook = notebooks.read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and PLACE in cell.source]
    if not cells:
        raise ValueError(f"{path.name} has no {PLACE}…): where does it read its preset?")
    for cell in cells:
        cell.source = cell.source.replace(PLACE, f"{PLACE}, steps={STEPS}")
    folder.mkdir(parents=True, exist_ok=True)
    notebooks.write(notebook, folder / path.name)
    return folder / path.name


def run_one(path: Path, side: Side, output: Path) -> dict:
    """Seconds, or what failed: the executed notebook lies in `output`, and so does a failed one."""
    environment = side.environment | {"COURSE_OUTPUT": str(output / "results")}
    try:
        seconds = notebooks.execute(path, output / path.name, {"PRESET": side.preset}, environment)
    except Exception as error:  # whatever it is, the others shall run
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"seconds": seconds}


def run_all(given: dict[str, Callable[[], Side]], paths: Iterable[Path], output: Path) -> dict[str, dict]:
    """{model: {notebook: what came of it}}; written to `output`/gpu_notebooks.json after each notebook."""
    found: dict[str, dict] = {}
    about = {"steps": STEPS, "versions": versions()}
    for name, make in given.items():
        side, found[name] = make(), {}
        for path in paths:
            copy = with_steps(path, output / name / "sources")
            found[name][path.stem] = run_one(copy, side, output / name)
            print(f"{name} {path.stem}: {json.dumps(found[name][path.stem], ensure_ascii=False)}", flush=True)
            write_json_atomic(output / "gpu_notebooks.json", about | {"found": found})
    return found


# --- the command -------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_notebooks", description=__doc__)
    parser.add_argument("--only", default=ONLY, help=f"which notebooks (default: {ONLY})")
    parser.add_argument("--models", nargs="+", choices=("MiniSD", MODEL), default=["MiniSD", MODEL])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too: to try this program")
    parser.add_argument("--output", type=Path, help="folder of what is written (default: gpu-notebooks below runs/)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 1 when a notebook failed, 2 when there is no CUDA GPU."""
    given, device = arguments(argv), default_device()
    if device.type != "cuda" and not given.tiny:
        print("benchmarks.gpu_notebooks needs a CUDA GPU; --tiny tries it on a CPU", file=sys.stderr)
        return 2
    output = (given.output or runs_folder() / "gpu-notebooks").resolve()
    with tempfile.TemporaryDirectory() as work:
        wanted = {name: make for name, make in sides(Path(work), device, given.tiny).items() if name in given.models}
        found = run_all(wanted, notebooks.select(given.only), output)
    failed = [f"{model} {name}" for model, done in found.items() for name, one in done.items() if "failed" in one]
    print(f"failed: {', '.join(failed) or 'none'}; see {output / 'gpu_notebooks.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
