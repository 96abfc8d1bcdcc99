"""Measuring pictures: intervals against published values, and agreement on answers whose truth is known."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import lora
from helpers.adapters.writing import save_adapter
from helpers.diffusion.sampling import generate
from helpers.evaluation.classifier import HEADS, INPUT, Classifier
from helpers.evaluation.measures import (
    SCORED,
    Evaluation,
    Verdict,
    adapted,
    agreement,
    asked,
    bootstrap,
    content_counts,
    evaluate,
    evaluation_scenes,
    judge,
    named,
    random_adapter,
    wilson,
)
from helpers.world.captions import prompt
from helpers.world.scenes import HELD_OUT_PAIRS, STYLES, sample_scene


def true_answers(scenes, style, **wrong):
    """What a perfect judge would say of these scenes; `wrong` replaces whole columns."""
    names = {a: [getattr(s, a) for s in scenes] for a in HEADS if a != "style"} | {"style": [style] * len(scenes)}
    one_hot = np.eye(len(STYLES))[[STYLES.index(style)] * len(scenes)]
    return Verdict(names | wrong, one_hot)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return Classifier().eval()


# --- intervals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_newcombe(successes, n, low, high):
    measure = wilson(successes, n)
    assert measure.value == successes / n and measure.n == n
    assert measure.interval == pytest.approx((low, high), abs=5e-5)


def test_wilson_mirrors():
    yes, no = wilson(30, 200), wilson(170, 200)
    assert yes.interval == pytest.approx((1 - no.high, 1 - no.low))
    assert wilson(200, 200).high == 1.0 and wilson(200, 200).low < 1.0


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(successes, n):
    with pytest.raises(ValueError, match="no share"):
        wilson(successes, n)


def test_bootstrap_is_close_to_the_normal_interval():
    values = np.random.default_rng(1).normal(0.4, 0.1, 400)
    measure = bootstrap(values)
    error = values.std() / 20  # of the mean: s / sqrt(n)
    assert measure.value == pytest.approx(values.mean()) and measure.n == 400
    assert measure.interval == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=1e-3)


def test_bootstrap_is_deterministic_and_takes_constants():
    assert bootstrap([0.1, 0.9, 0.4]) == bootstrap([0.1, 0.9, 0.4])
    values = np.linspace(0, 1, 50)
    assert bootstrap(values, seed=1).interval != bootstrap(values, seed=2).interval
    assert bootstrap([0.25] * 5).interval == (0.25, 0.25)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


# --- agreement ----------------------------------------------------------------------------------------------------


def test_a_perfect_judge_agrees_everywhere():
    scenes = evaluation_scenes(40)
    for style in ("render", "doodles", "vintage", "sketch"):
        measures = agreement(scenes, true_answers(scenes, style), style)
        assert set(measures) == set(SCORED[style])
        assert all(measure.value == 1.0 for measure in measures.values())


def test_agreement_counts_each_mistake_once():
    scenes = evaluation_scenes(20)
    subjects = [scene.subject for scene in scenes]
    subjects[3] = "robot" if subjects[3] != "robot" else "cat"
    subjects[7] = "robot" if subjects[7] != "robot" else "cat"
    measures = agreement(scenes, true_answers(scenes, "doodles", subject=subjects), "doodles")
    assert measures["subject"].value == pytest.approx(18 / 20) and measures["subject"].n == 20
    assert measures["headwear"].value == 1.0


def test_colours_count_only_where_there_is_something_to_colour():
    scenes = evaluation_scenes(60)
    wrong = ["red" if s.headwear_color != "red" else "blue" for s in scenes]
    measures = agreement(scenes, true_answers(scenes, "doodles", headwear_color=wrong), "doodles")
    hats = sum(scene.headwear != "none" for scene in scenes)
    assert 0 < hats < 60
    assert measures["headwear_color"].n == hats and measures["headwear_color"].value == 0.0
    assert measures["headwear"].n == 60
    bare = [replace(scene, headwear="none", headwear_color="none") for scene in scenes[:3]]
    assert "headwear_color" not in agreement(bare, true_answers(bare, "doodles"), "doodles")


def test_styles_are_scored_only_on_what_they_show():
    assert "background" in SCORED["doodles"] and "background" not in SCORED["vintage"]
    assert not any("color" in attribute for attribute in SCORED["sketch"])
    assert set(SCORED) == set(STYLES)
    with pytest.raises(ValueError, match="unknown style 'cubist'; known: render"):
        agreement([], true_answers([], "render"), "cubist")
    with pytest.raises(ValueError, match="unknown style 'cubist'"):
        content_counts([], true_answers([], "render"), "cubist")


def test_asked():
    scene = replace(evaluation_scenes(1)[0], headwear="none", neckwear="tie", neckwear_color="red")
    assert asked(scene, "subject") and asked(scene, "headwear") and asked(scene, "clothes_color")
    assert asked(scene, "neckwear_color") and not asked(scene, "headwear_color")
    assert asked(replace(scene, expression="frown"), "expression")
    assert not asked(replace(scene, expression="neutral"), "expression")


# --- what a prompt names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["render", "doodles", "vintage", "sketch"])
def test_named_finds_what_the_canonical_prompt_says(style):
    rng = random.Random(5)
    for _ in range(200):
        scene = sample_scene(rng, "all")
        unsaid = ("none", "neutral", "plain")  # what has no word
        truth = {a: getattr(scene, a) for a in SCORED[style] if getattr(scene, a) not in unsaid}
        found = named(prompt(scene, style))
        assert {a: v for a, v in found.items() if a in SCORED[style]} == truth


def test_named_knows_the_sheriff_and_says_nothing_of_the_rest():
    assert named("a bat hero as a sheriff, vintage style") == {
        "subject": "hero",
        "headwear": "cowboy hat",
        "badge": "sheriff star",
    }
    assert named("a red-haired woman with sunglasses") == {"subject": "woman", "eyewear": "sunglasses"}
    assert named("a drawing of a man with a red scarf") == {
        "subject": "man",
        "neckwear": "scarf",
        "neckwear_color": "red",
    }
    assert named("") == {}


def test_content_counts():
    prompts = ["a drawing of a man with a red scarf", "a drawing of a cat, on a pink background"]
    names = {attribute: ["none", "none"] for attribute in HEADS}
    names |= {"subject": ["man", "dog"], "neckwear": ["scarf", "none"], "background": ["blue", "pink"]}
    verdict = Verdict(names | {"neckwear_color": ["blue", "none"]}, np.zeros((2, len(STYLES))))
    assert content_counts(prompts, verdict, "doodles") == [(2, 3), (1, 2)]
    assert content_counts(prompts, verdict, "vintage") == [(2, 3), (0, 1)]  # vintage fades its backgrounds


# --- scenes to evaluate on ------------------------------------------------------------------------------------------


def test_more_scenes_begin_with_the_same():
    assert evaluation_scenes(30)[:8] == evaluation_scenes(8)
    assert evaluation_scenes(8, seed=1) != evaluation_scenes(8)
    assert len({scene.seed for scene in evaluation_scenes(30)}) == 30


def test_pairs_are_kept_apart():
    pairs = {(scene.subject, scene.headwear) for scene in evaluation_scenes(60)}
    assert not pairs & HELD_OUT_PAIRS
    held_out = {(scene.subject, scene.headwear) for scene in evaluation_scenes(60, pairs="held_out")}
    assert held_out <= HELD_OUT_PAIRS


# --- the judge ------------------------------------------------------------------------------------------------------


def pictures_of(colours, size=INPUT):
    return [Image.new("RGB", (size, size), colour) for colour in colours]


def test_judge_answers_for_each_picture_whatever_the_batch(classifier):
    pictures = pictures_of(["red", "green", "blue", "white", "black"])
    whole = judge(pictures, classifier)
    split = judge(pictures, classifier, batch_size=2)
    assert whole.styles.shape == (5, len(STYLES)) and np.allclose(whole.styles.sum(1), 1)
    assert np.allclose(whole.styles, split.styles, atol=1e-6) and whole.names == split.names
    assert set(whole.names) == set(HEADS)
    assert all(value in HEADS[a] for a, values in whole.names.items() for value in values)
    assert np.array_equal(whole.style_probability("doodles"), whole.styles[:, STYLES.index("doodles")])


def test_judge_takes_pictures_of_other_and_mixed_sizes(classifier):
    mixed = [*pictures_of(["red"], 96), *pictures_of(["blue"], 64)]
    plain = pictures_of(["red", "blue"])
    assert np.allclose(judge(mixed, classifier).styles, judge(plain, classifier).styles, atol=1e-4)
    with pytest.raises(ValueError, match="no pictures"):
        judge([], classifier)


def test_evaluate_uses_the_same_prompts_and_noise_each_time(tiny, classifier, monkeypatch):
    monkeypatch.setattr("helpers.evaluation.measures.load_classifier", lambda: classifier)
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0}
    small = evaluate(tiny, "doodles", 2, **settings)
    large = evaluate(tiny, "doodles", 3, **settings)
    assert isinstance(small, Evaluation) and small.prompts == large.prompts[:2]
    assert small.prompts == [prompt(scene, "doodles") for scene in evaluation_scenes(2)]
    for one, other in zip(small.pictures, large.pictures, strict=False):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert large.style("doodles").n == 3 and large.content("doodles")["subject"].n == 3
    alone = generate(tiny, small.prompts[1:], [1001], **settings)[0]  # picture k starts from seed + k
    assert np.abs(np.asarray(alone, int) - np.asarray(small.pictures[1], int)).max() <= 1


# --- adapters on and off --------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny):
    """The tiny model with an adapter that does something."""
    torch.manual_seed(0)
    lora.inject(tiny.unet, ["to_q", "to_v"], rank=2, alpha=4.0)
    for layer in lora.lora_layers(tiny.unet).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return tiny


def test_random_adapter_keeps_the_norms_and_brings_the_bits_back(trained):
    unet = trained.unet
    before = {name: value.clone() for name, value in lora.lora_state_dict(unet).items()}
    deltas = [lora.delta_weight(layer).detach() for layer in lora.lora_layers(unet).values()]
    with random_adapter(unet, seed=3):
        others = [lora.delta_weight(layer).detach() for layer in lora.lora_layers(unet).values()]
        first = lora.lora_state_dict(unet)
        first = {name: value.clone() for name, value in first.items()}
    for delta, other in zip(deltas, others, strict=True):
        assert other.norm().item() == pytest.approx(delta.norm().item(), rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity(delta.flatten(), other.flatten(), dim=0)
        assert abs(cosine) < 0.9  # as large, but elsewhere
    after = lora.lora_state_dict(unet)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with random_adapter(unet, seed=3):
        assert all(torch.equal(value, first[name]) for name, value in lora.lora_state_dict(unet).items())


def test_random_adapter_restores_after_an_error_and_needs_layers(trained):
    before = {name: value.clone() for name, value in lora.lora_state_dict(trained.unet).items()}
    with pytest.raises(KeyError), random_adapter(trained.unet):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in lora.lora_state_dict(trained.unet).items())
    lora.remove(trained.unet)
    with pytest.raises(ValueError, match="load an adapter first"), random_adapter(trained.unet):
        pass


def test_adapted_puts_the_adapter_on_and_takes_it_off(trained, tmp_path):
    path = save_adapter(tmp_path, trained.unet)
    state = {name: value.clone() for name, value in lora.lora_state_dict(trained.unet).items()}
    lora.remove(trained.unet)
    modules = dict(trained.unet.named_modules())
    with adapted(trained, path) as unet:
        assert all(torch.equal(value, state[name]) for name, value in lora.lora_state_dict(unet).items())
    assert not lora.lora_layers(trained.unet) and dict(trained.unet.named_modules()) == modules
    with pytest.raises(KeyError), adapted(trained, path):
        raise KeyError
    assert not lora.lora_layers(trained.unet)
    with adapted(trained, None) as unet:
        assert not lora.lora_layers(unet)
