"""Encoders: CLIP against transformers' own forward pass, pixels and tokens made by hand; the drawn world's classifier
against its layers called one by one."""

import io
import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from helpers.diffusion.components import ComponentsError
from helpers.evaluation.classifier import Classifier, load_classifier
from helpers.evaluation.encoders import CHUNK, ClipEncoder, WorldEncoder, clip_name, same_side, unit_rows
from helpers.world.captions import prompt
from helpers.world.scenes import sample_scene
from helpers.world.styles import render

START, END = "<|startoftext|>", "<|endoftext|>"
SIDE, MEAN, STD = 32, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
LETTERS = "abcdefghijklmnopqrstuvwxyz',!"
MERGES = [("c", "a"), ("ca", "t</w>"), ("h", "a"), ("ha", "t</w>"), ("r", "e"), ("re", "d</w>")]
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *("".join(pair) for pair in MERGES), START, END]
VOCABULARY = {token: i for i, token in enumerate(TOKENS)}
PROMPTS = ["a red cat", "Cat's hat, red!", "a dog  in a hat", ""]


def write_model(folder):
    """A CLIP of a few thousand random weights, large enough that every picture and prompt gets another embedding."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(TOKENS), "max_position_embeddings": 77}
    text |= {"bos_token_id": VOCABULARY[START], "eos_token_id": VOCABULARY[END], "pad_token_id": VOCABULARY[END]}
    vision = sizes | {"hidden_size": 24, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    settings = {"crop_size": SIDE, "size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True}
    settings |= {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def write_classic_tokenizer(folder, pad=END):
    """The files that Stable Diffusion's hub repositories hold: no tokenizer.json."""
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": token | {"content": START}, "eos_token": token | {"content": END}}
    special |= {"unk_token": token | {"content": END}}
    config = {name: value | {"__type": "AddedToken"} for name, value in special.items()}
    config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    config |= {"tokenizer_class": "CLIPTokenizer", "pad_token": END}
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP as transformers 5 saves it, with tokenizer.json. Read only."""
    folder = tmp_path_factory.mktemp("clip")
    write_model(folder)
    CLIPTokenizer(vocab=VOCABULARY, merges=MERGES, model_max_length=77).save_pretrained(folder)
    assert (folder / "tokenizer.json").exists()
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return ClipEncoder.load(folder, "cpu")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder to damage."""
    return shutil.copytree(folder, tmp_path / "clip")


def noise(count, width=SIDE, height=SIDE, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def pixels_by_hand(picture):
    """[3, SIDE, SIDE] as CLIP's own code: shorter side to SIDE, bicubic, centre crop, then (x - mean) / spread."""
    scale = SIDE / min(picture.size)
    width, height = (int(side * scale + 1e-9) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    square = np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
    return torch.from_numpy((square - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


def ids_by_hand(words):
    """Ids [77] of tokens spelled out, padded with the end's."""
    ids = [VOCABULARY[token] for token in (START, *words.split(), END)]
    return torch.tensor(ids + [VOCABULARY[END]] * (77 - len(ids)))


SPELLED = [
    "a</w> red</w> cat</w>",
    "cat</w> ' s</w> hat</w> ,</w> red</w> !</w>",
    "a</w> d o g</w> i n</w> a</w> hat</w>",
]


# --- CLIP -------------------------------------------------------------------------------------------------------------


def test_clip_agrees_with_transformers_forward(folder, clip):
    model = CLIPModel.from_pretrained(folder).eval()
    pictures = noise(2) + noise(1, 50, 40)
    pixels = torch.stack([pixels_by_hand(picture) for picture in pictures])
    ids = torch.stack([ids_by_hand(words) for words in SPELLED])
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels)
    cosines = (whole.logits_per_image / model.logit_scale.exp()).detach().numpy()
    assert torch.allclose(clip.pictures(pictures), whole.image_embeds, atol=1e-5)
    assert torch.allclose(clip.texts(PROMPTS[:3]), whole.text_embeds, atol=1e-5)
    found = clip.adherence(pictures, PROMPTS[:3])
    assert found.dtype == np.float64 and found.shape == (3,)
    assert found == pytest.approx(100 * cosines.diagonal(), abs=1e-3)
    assert clip.adherence(pictures, PROMPTS[2::-1]) == pytest.approx(100 * cosines[:, ::-1].diagonal(), abs=1e-3)
    assert np.ptp(cosines) > 0.1  # or the comparison would say nothing


def test_clip_rows_have_length_1_whatever_the_chunk(clip):
    pictures = noise(CHUNK + 3)
    rows = clip.pictures(pictures)
    assert rows.shape == (CHUNK + 3, 12) and rows.dtype == torch.float32 and rows.device.type == "cpu"
    assert torch.allclose(rows.norm(dim=1), torch.ones(CHUNK + 3), atol=1e-6)
    assert torch.allclose(rows, torch.cat([clip.pictures([picture]) for picture in pictures]), atol=1e-5)
    assert not rows.requires_grad and not rows.is_inference()
    prompts = [f"a {letter} cat" for letter in LETTERS] + PROMPTS * 2
    assert torch.allclose(clip.texts(prompts), torch.cat([clip.texts([text]) for text in prompts]), atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (80, 33), (33, 80), (300, 200), (17, 41)])
def test_clip_preprocessing_against_by_hand(clip, width, height):
    picture = noise(1, width, height)[0]
    pixels = clip.processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(torch.as_tensor(pixels), pixels_by_hand(picture), atol=1e-6)


def test_clip_takes_any_mode(clip):
    gray = noise(1)[0].convert("L")
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    white = Image.new("RGB", (40, 40), "white")
    found = clip.pictures([gray, gray.convert("RGB"), clear, white])
    assert torch.allclose(found[0], found[1], atol=1e-6) and torch.allclose(found[2], found[3], atol=1e-6)
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    file = io.BytesIO()
    noise(1)[0].save(file, "PNG", exif=exif)
    upright = noise(1)[0].transpose(Image.Transpose.ROTATE_180)
    assert torch.allclose(clip.pictures([Image.open(file)]), clip.pictures([upright]), atol=1e-6)


def test_clip_reads_outputs_of_transformers_4_and_5(clip, monkeypatch):
    expected = clip.adherence(noise(2), PROMPTS[:2])
    for name in ("get_image_features", "get_text_features"):
        ours = getattr(clip.model, name)

        def tensor(ours=ours, **inputs):
            output = ours(**inputs)
            return output if isinstance(output, torch.Tensor) else output.pooler_output

        monkeypatch.setattr(clip.model, name, tensor)
    assert np.array_equal(clip.adherence(noise(2), PROMPTS[:2]), expected)


def test_clip_cuts_long_prompts(clip):
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than 77 tokens"):
        rows = clip.texts(["cat " * 80 + "dog", "a cat"])
    assert torch.allclose(rows, clip.texts(["cat " * 75, "a cat"]), atol=1e-6)


def test_clip_is_read_without_a_word(folder, capfd):
    clip = ClipEncoder.load(folder, "cpu")
    assert capfd.readouterr() == ("", "")
    assert clip.name == "CLIP ViT-24/8@32px" and not clip.model.training
    assert not any(weight.requires_grad for weight in clip.model.parameters())
    assert ClipEncoder.load(str(folder), "cpu", "our CLIP").name == "our CLIP"


def test_clip_computes_in_float32_what_is_stored_in_16_bits(copy, clip):
    weights = load_file(copy / "model.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float16", "torch_dtype": "float16"}))
    half = ClipEncoder.load(copy, "cpu")
    assert {weight.dtype for weight in half.model.parameters()} == {torch.float32}
    assert torch.allclose(half.pictures(noise(2)), clip.pictures(noise(2)), atol=1e-2)


def test_clip_names(clip):
    vision = clip.model.config.vision_config
    old = vision.hidden_size, vision.patch_size, vision.image_size
    try:
        for sizes, name in (((1024, 14, 224), "L/14"), ((768, 32, 224), "B/32"), ((1024, 14, 336), "L/14@336px")):
            vision.hidden_size, vision.patch_size, vision.image_size = sizes
            assert clip_name(clip.model) == f"CLIP ViT-{name}"
    finally:
        vision.hidden_size, vision.patch_size, vision.image_size = old


# --- the tokenizer's files --------------------------------------------------------------------------------------------


def classic(folder, pad=END):
    """Replace the folder's tokenizer by the hub's classic files."""
    (folder / "tokenizer.json").unlink()
    write_classic_tokenizer(folder, pad)
    return folder


def test_classic_tokenizer_files_are_read(copy, clip):
    other = ClipEncoder.load(classic(copy), "cpu")
    for words, text in zip(SPELLED, PROMPTS, strict=False):
        ids = other.tokenizer(text, padding="max_length", max_length=77).input_ids
        assert ids == ids_by_hand(words).tolist()
    assert other.tokenizer.model_max_length == 77 and other.tokenizer.pad_token == END
    assert np.array_equal(other.adherence(noise(4), PROMPTS), clip.adherence(noise(4), PROMPTS))


def test_classic_files_that_pad_with_an_exclamation_mark(copy, clip):
    """As Stable Diffusion 2's. Padding changes nothing, since CLIP's text encoder reads from left to right."""
    other = ClipEncoder.load(classic(copy, "!"), "cpu")
    assert other.tokenizer.pad_token_id == VOCABULARY["!"]
    prompts = [text for text in PROMPTS if "!" not in text]
    assert np.allclose(other.adherence(noise(3), prompts), clip.adherence(noise(3), prompts), atol=1e-4)
    # in a prompt, "!" is then read as padding, and no longer as the end of a word
    assert other.tokenizer("red!").input_ids[1:-1] == [VOCABULARY["red</w>"], VOCABULARY["!"]]


@pytest.mark.parametrize("gone", [["vocab.json"], ["merges.txt"], ["vocab.json", "merges.txt"]])
def test_an_incomplete_tokenizer_is_an_error(copy, gone):
    classic(copy)
    for name in gone:
        (copy / name).unlink()
    with pytest.raises(ComponentsError, match="tokenizer|vocab"):
        ClipEncoder.load(copy, "cpu")


@pytest.mark.parametrize("gone", ["model.safetensors", "preprocessor_config.json"])
def test_a_missing_file_is_an_error(copy, gone):
    (copy / gone).unlink()
    with pytest.raises(ComponentsError, match="cannot read CLIP from"):
        ClipEncoder.load(copy, "cpu")


def test_pickles_and_folders_without_all_weights_are_errors(copy, folder):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(ComponentsError, match="cannot read CLIP from"):
        ClipEncoder.load(copy, "cpu")
    del weights["visual_projection.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ComponentsError, match="lacks these weights: visual_projection.weight"):
        ClipEncoder.load(copy, "cpu")
    (copy / "config.json").unlink()
    for place in (copy, folder / "missing"):
        with pytest.raises(ComponentsError, match="it has no config.json; download it first"):
            ClipEncoder.load(place, "cpu")


# --- the drawn world --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return Classifier().eval()


@pytest.fixture(scope="module")
def drawn():
    """24 scenes, their pictures as doodles and their prompts."""
    scenes = [sample_scene(random.Random(k)) for k in range(24)]
    return [render(scene, "doodles", 64) for scene in scenes], [prompt(scene, "doodles") for scene in scenes]


def test_world_features_are_what_the_heads_read(untrained):
    pictures = noise(3, 64, 64)
    x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures])
    with torch.no_grad():
        cells = torch.relu(untrained.blocks(untrained.stem(x)))  # [3, 160, 8, 8], averaged to 4 x 4 below
        cells = cells.unflatten(2, (4, -1)).unflatten(4, (4, -1)).mean((3, 5))
        expected = torch.relu(untrained.shared(cells.flatten(1)))
    rows = WorldEncoder("doodles", untrained).pictures(pictures)
    assert rows.shape == (3, 192) and rows.dtype == torch.float32
    assert torch.allclose(rows, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-6)
    assert not rows.is_inference() and not untrained.heads["style"]._forward_pre_hooks


def test_world_features_do_not_depend_on_the_company(untrained):
    encoder = WorldEncoder("doodles", untrained)
    mixed = [noise(1, 96, 96)[0], noise(1, 64, 64)[0], noise(1, 128, 70)[0], noise(1, 64, 80)[0]]
    alone = torch.cat([encoder.pictures([picture]) for picture in mixed])
    assert torch.allclose(encoder.pictures(mixed), alone, atol=1e-5)
    assert same_side(mixed) == [[1, 3], [2], [0]]


def test_world_adherence_knows_right_prompts_from_wrong(drawn):
    pictures, prompts = drawn
    encoder = WorldEncoder("doodles")
    right = encoder.adherence(pictures, prompts)
    wrong = encoder.adherence(pictures, prompts[1:] + prompts[:1])
    assert right.shape == (24,) and right.mean() > 0.9 > 0.6 > wrong.mean()
    # mixed sizes: each share stays with its picture
    larger = [p.resize((96, 96)) if k % 2 else p for k, p in enumerate(pictures)]
    swapped = [prompts[k] if k % 3 else prompts[k - 1] for k in range(24)]
    expected = [encoder.adherence([p], [t])[0] for p, t in zip(larger, swapped, strict=True)]
    assert encoder.adherence(larger, swapped).tolist() == expected


def test_world_adherence_is_the_share_of_named_attributes(drawn):
    pictures, _ = drawn
    encoder = WorldEncoder("doodles")
    names = {"man", "woman", "cat", "dog", "bear", "rabbit", "robot", "alien", "skeleton", "hero"}
    each = {name: encoder.adherence(pictures[:1], [f"a drawing of a {name}"])[0] for name in names}
    assert sorted(each.values()) == [0.0] * 9 + [1.0]  # one subject is seen
    subject = max(each, key=each.get)
    shirts = [
        encoder.adherence(pictures[:1], [f"a drawing of a {subject} in a {color} shirt"])[0]
        for color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "gray", "brown")
    ]
    assert max(shirts) == 1.0 and min(shirts) == 0.5


def test_world_encoder_refuses(drawn, untrained):
    pictures, prompts = drawn
    with pytest.raises(ValueError, match="unknown style 'cubist'"):
        WorldEncoder("cubist", untrained)
    encoder = WorldEncoder("doodles", untrained)
    with pytest.raises(ValueError, match="'something nice' names nothing"):
        encoder.adherence(pictures[:2], [prompts[0], "something nice"])
    assert not untrained.heads["style"]._forward_pre_hooks
    assert load_classifier().heads["style"].in_features == 192


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "world"])
def test_every_picture_has_its_prompt(kind, clip, untrained):
    encoder = clip if kind == "clip" else WorldEncoder("doodles", untrained)
    assert isinstance(encoder.name, str) and encoder.name
    with pytest.raises(ValueError, match="2 pictures need a list of as many prompts, not 1"):
        encoder.adherence(noise(2), ["a cat"])
    with pytest.raises(ValueError, match="need a list"):
        encoder.adherence(noise(5), "a cat")
    for empty in (lambda: encoder.pictures([]), lambda: encoder.adherence([], [])):
        with pytest.raises(ValueError, match="no pictures"):
            empty()
    if kind == "clip":
        with pytest.raises(ValueError, match="no prompts"):
            encoder.texts([])


def test_rows_without_direction_are_errors():
    assert torch.allclose(unit_rows(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="zero or not finite"):
            unit_rows(torch.tensor([[1.0, 2.0], [bad, 0.0]]))
