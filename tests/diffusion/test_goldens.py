"""Numbers of the real Stable Diffusion that a machine without its weights can check.

The tokenizer is rebuilt from the list of merges that OpenAI's CLIP comes with, found in the package openai-clip (which
is read and never imported); the schedule and the timesteps follow from the configurations alone.
`COURSE_REAL=1` adds the one test that needs the weights and a GPU.
"""

import gzip
import hashlib
import json
import os
from importlib.metadata import distribution
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from transformers import CLIPTokenizer

from helpers.diffusion.components import CLIP_VOCABULARY, load_components, use_padding_of_stable_diffusion_2
from helpers.diffusion.pictures import to_pictures
from helpers.diffusion.sampling import inference_timesteps, sample
from helpers.diffusion.schedule import alphas_cumprod
from helpers.diffusion.text import tokenize
from helpers.presets.prompts import SD_FIGURES, SD_VALIDATION
from helpers.presets.sd_configs import CONFIGS, build_part
from helpers.presets.variants import get_preset

# --- the tokenizer -----------------------------------------------------------------------------------------------

START, END, EXCLAMATION = 49406, 49407, 0
IDS = {
    "a drawing of Donald Trump with a scarf": [320, 3610, 539, 4335, 1797, 593, 320, 13365],
    "Batman as a sheriff in a vintage style": [7223, 601, 320, 10309, 530, 320, 3266, 1844],
}
# Of tokenizer/merges.txt in the repositories of all three models
MERGES_SHA256 = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
MERGES_BYTES = 524_619
PIECES = 2 * 256  # each byte alone, and at the end of a word
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def merges_txt() -> str:
    """tokenizer/merges.txt: of the list in OpenAI's file the first lines, as many as the vocabulary has room for."""
    packed = distribution("openai-clip").locate_file("clip/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1:]
    return "\n".join(["#version: 0.2", *merges[: CLIP_VOCABULARY - PIECES - len(SPECIAL)]]) + "\n"


def vocabulary(merges: list[str]) -> dict[str, int]:
    """tokenizer/vocab.json: bytes, bytes that end a word, what merges make, and the two special tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]  # shown as the characters from 256 on
    letters = [*map(chr, printable), *(chr(256 + number) for number in range(len(others)))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {piece: number for number, piece in enumerate(pieces + SPECIAL)}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """The files of Stable Diffusion 2.1's tokenizer, with settings as on the hub."""
    folder, merges = tmp_path_factory.mktemp("tokenizer"), merges_txt()
    ends = {name: SPECIAL[1] for name in ("eos_token", "pad_token", "unk_token")} | {"bos_token": SPECIAL[0]}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True} | ends
    (folder / "merges.txt").write_text(merges, encoding="utf-8", newline="\n")
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges.splitlines()[1:])), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def reader(folder, model):
    """What `tokenize` needs of a model: the tokenizer, padded as the model was trained, and the text encoder."""
    parts = {"tokenizer": CLIPTokenizer.from_pretrained(folder), "text_encoder": build_part(model, "text_encoder")}
    use_padding_of_stable_diffusion_2(parts)
    return SimpleNamespace(**parts)


def test_the_merges_are_the_hubs_to_the_byte():
    content = merges_txt().encode("utf-8")
    assert (len(content), hashlib.sha256(content).hexdigest()) == (MERGES_BYTES, MERGES_SHA256)


@pytest.mark.parametrize("model", CONFIGS)
def test_the_real_tokenizer_reads_the_homeworks_prompts(tokenizer_folder, model):
    components = reader(tokenizer_folder, model)
    assert len(components.tokenizer) == CLIP_VOCABULARY == CONFIGS[model]["text_encoder"]["vocab_size"]
    padding = END if model == "sd15" else EXCLAMATION
    for prompt, words in IDS.items():
        ids = [START, *words, END]
        assert components.tokenizer(prompt).input_ids == ids
        assert tokenize(components, [prompt])[0].tolist() == ids + [padding] * (77 - len(ids))


@pytest.mark.filterwarnings("error")
def test_no_prompt_of_the_homework_is_cut(tokenizer_folder):
    prompts = [prompt for some in (*SD_VALIDATION.values(), *SD_FIGURES.values()) for prompt in some]
    assert set(IDS) <= set(prompts)
    assert tokenize(reader(tokenizer_folder, "sd21"), prompts).shape == (len(prompts), 77)


# --- the schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", CONFIGS)
def test_the_schedule_has_stable_diffusions_values(model):
    config = {key: value for key, value in CONFIGS[model]["scheduler"].items() if key != "_class_name"}
    for alpha_bar in (alphas_cumprod(), DDPMScheduler.from_config(config).alphas_cumprod):
        assert alpha_bar[0].item() == pytest.approx(0.99915, abs=1e-7)
        assert alpha_bar[999].item() == pytest.approx(0.0046601, abs=5e-8)


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [(20, [951, 901, 851], [101, 51, 1]), (25, [961, 921, 881], [81, 41, 1]), (50, [981, 961, 941], [41, 21, 1])],
)
def test_the_leading_timesteps(steps, first, last):
    """Sampling never sees timestep 999 and ends at 1, whatever the number of steps."""
    timesteps = inference_timesteps(steps)
    assert (timesteps[:3], timesteps[-3:], len(timesteps)) == (first, last, steps)


# --- with the weights --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("COURSE_REAL"), reason="COURSE_REAL=1 loads Stable Diffusion 2.1 onto a GPU")
@torch.inference_mode()
def test_stable_diffusion_draws_what_diffusers_own_test_expects():
    """diffusers, tests/pipelines/stable_diffusion_2, test_stable_diffusion_v_pred_upcast_attention."""
    components = load_components(get_preset("sd21@fp16"), "cuda")
    # The pipeline's noise: drawn in half precision, whose numbers are others than float32's
    noise = torch.randn(1, *components.latent_shape, generator=torch.manual_seed(0), dtype=torch.float16)
    prompts = ["A painting of a squirrel eating a burger"]
    pictures = to_pictures(components, sample(components, prompts, noise, num_inference_steps=20, guidance_scale=7.5))
    expected = torch.tensor([0.4209, 0.4087, 0.4097, 0.4209, 0.3860, 0.4329, 0.4280, 0.4324, 0.4187])
    assert pictures.shape == (1, 3, 768, 768)
    assert (pictures[0, -1, 253:256, 253:256].flatten().cpu() - expected).abs().max() < 0.05
