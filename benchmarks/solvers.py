"""How few evaluations of the U-Net make as good pictures: `python -m benchmarks.solvers`

DDIM and DPM-Solver++ with fewer and fewer steps, on the same prompts from the same noise. See README.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks import records
from helpers.base.provenance import code_hash, versions
from helpers.diffusion.components import Components, load_components
from helpers.diffusion.dpm_solver import sample_by_dpm_solver
from helpers.diffusion.sampling import generate, sample
from helpers.diffusion.weights import weights_fingerprint
from helpers.evaluation.faces import faces
from helpers.evaluation.imagenet import ImageNetEncoder
from helpers.evaluation.measures import adapted, bootstrap, content_shares, evaluation_scenes, judge
from helpers.evaluation.sight import fidelity_to_drawings
from helpers.presets.variants import get_preset
from helpers.world.captions import prompt

NAME = "solvers"
SEED = 8000  # of the scenes: not those that notebook 07 reports
DDIM, DPM = "DDIM", "DPM-Solver++"
SAMPLERS = {DDIM: sample, DPM: sample_by_dpm_solver}
WAYS = ((DDIM, 25), (DDIM, 12), (DPM, 12), (DPM, 8), (DPM, 6))


def measure(components: Components, style: str, solver: str, steps: int, count: int) -> dict:
    """How near to drawings, how whole and how obedient `count` pictures are, and the seconds that one took."""
    scenes = evaluation_scenes(count, SEED)
    texts = [prompt(scene, style) for scene in scenes]
    begin = time.perf_counter()
    pictures = generate(components, texts, range(count), SAMPLERS[solver], num_inference_steps=steps)
    seconds = (time.perf_counter() - begin) / count
    found = {
        "distance": fidelity_to_drawings(components, scenes, pictures, style, ImageNetEncoder()),
        "whole faces": faces(pictures, scenes),
        "content": bootstrap(content_shares(scenes, judge(pictures), style)),
    }
    return {name: [round(x, 4) for x in (m.value, m.low, m.high)] for name, m in found.items()} | {"seconds": seconds}


def main() -> None:
    """Measure all ways in turn, print a line for each, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", default="render", help="of the prompts and the drawings (default: %(default)s)")
    parser.add_argument("--adapter", type=Path, help="file or folder of an adapter to that style")
    parser.add_argument("--count", type=int, default=200, help="pictures of each way (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the record")
    given = parser.parse_args()
    components, found = load_components(get_preset("mini")), {}
    file = given.results / f"{records.device_slug(components.device)}.json"
    with adapted(components, given.adapter):
        for solver, steps in WAYS:
            way = f"{solver}, {steps} steps"
            found[way] = measure(components, given.style, solver, steps, given.count)
            print(f"{way}: {found[way]}", flush=True)
    kept = records.read_results(file).get(NAME, {}).get("styles", {})
    about = {
        "code": code_hash("helpers.diffusion.sampling", "helpers.diffusion.dpm_solver"),
        "weights": weights_fingerprint(get_preset("mini"))[:12],
        "count": given.count,
        "versions": versions(),
    }
    records.write_record(file, NAME, about | {"styles": kept | {given.style: found}})


if __name__ == "__main__":
    main()
