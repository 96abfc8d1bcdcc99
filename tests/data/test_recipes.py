"""Datasets with something wrong on purpose: what changes, how much of it, and what never does."""

import json

import pytest

from helpers.data import recipes
from helpers.data.fingerprint import data_fingerprint
from helpers.data.loading import load_pictures
from helpers.data.recipes import drawn_by, fingerprint, parse, share_of
from helpers.presets.configuration import DatasetSpec
from helpers.world import datasets as drawn

SIZE = 16
SKEW = "doodles?skew=background:pink:0.75"


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """One cache for the whole file: the pictures are drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("recipes")))
        yield


def train(changes, n=20):
    return drawn_by(f"doodles{changes}", "train", SIZE, n)


def content(dataset):
    """Everything that is in the rows."""
    return [(row["image"].tobytes(), row["text"], row["scene"]) for row in dataset]


def without_text(dataset):
    return [(row["image"].tobytes(), row["scene"]) for row in dataset]


def moved_rows(changed, plain):
    return [row for row, (a, b) in enumerate(zip(changed["text"], plain["text"], strict=True)) if a != b]


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_name_is_a_style_and_its_changes():
    assert parse("doodles") == parse("doodles?") == ("doodles", {})
    assert parse("doodles?shuffled=0.3") == ("doodles", {"shuffled": "0.3"})
    both = {"shuffled": "0.5", "skew": "headwear:cowboy hat:0.8"}
    assert parse("vintage?shuffled=0.5&skew=headwear:cowboy hat:0.8") == ("vintage", both)


@pytest.mark.parametrize("place", ["doodles?blurred=0.3", "doodles?shuffled=0.1&Skew=x", "doodles?shuffled=0.1&"])
def test_an_unknown_change_is_named(place):
    with pytest.raises(ValueError, match="unknown change .* known: shuffled, skew"):
        parse(place)


@pytest.mark.parametrize("text", ["", "half", "-0.1", "1.01", "nan", "inf"])
def test_a_share_is_a_number_from_0_to_1(text):
    with pytest.raises(ValueError, match="a share in 'here' should be a number from 0 to 1"):
        share_of(text, "here")
    with pytest.raises(ValueError, match="a share in"):
        train(f"?shuffled={text}")


def test_the_ends_of_a_share_are_shares():
    assert [share_of(text, "") for text in ("0", "1", "0.25", "1e-2")] == [0.0, 1.0, 0.25, 0.01]


def test_a_name_without_changes_is_the_world_s_dataset():
    plain = drawn.drawn_dataset("doodles", "train", size=SIZE, n=20)
    assert content(train("")) == content(train("?")) == content(plain)


# --- shuffled captions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share, moved", [(0, 0), (0.1, 2), (0.25, 5), (0.5, 10), (1, 20)])
def test_exactly_the_share_of_the_captions_moves(share, moved):
    plain, changed = train(""), train(f"?shuffled={share}")
    assert len(set(plain["text"])) == 20, "no two rows of this choice have the same caption"
    assert len(moved_rows(changed, plain)) == moved
    assert sorted(changed["text"]) == sorted(plain["text"]), "captions move, and none is lost"


def test_shuffling_leaves_pictures_scenes_and_columns_as_they_are():
    plain, changed = train(""), train("?shuffled=0.5")
    assert without_text(changed) == without_text(plain)
    assert changed.features == plain.features and changed.column_names == plain.column_names


def test_shuffling_twice_gives_the_same_rows():
    assert content(train("?shuffled=0.5")) == content(train("?shuffled=0.5"))


def test_many_rows_move_without_one_that_stays():
    plain = drawn.drawn_dataset("doodles", "train", size=SIZE, n=20)
    numbered = plain.remove_columns("text").add_column("text", [str(k) for k in range(20)])
    numbered = numbered.select_columns(["image", "text", "scene"])
    changed = recipes.shuffled(numbered, 1.0)
    assert all(int(text) != row for row, text in enumerate(changed["text"]))


# --- a skewed choice --------------------------------------------------------------------------------------------------


def share_with(dataset, attribute, value):
    scenes = [json.loads(scene) for scene in dataset["scene"]]
    return sum(scene[attribute] == value for scene in scenes)


@pytest.mark.parametrize(
    "rule, attribute, value, count",
    [
        ("background:pink:0.75", "background", "pink", 15),
        ("headwear:cowboy hat:0.3", "headwear", "cowboy hat", 6),
        ("expression:frown:0", "expression", "frown", 0),
        ("expression:frown:0.9", "expression", "frown", 18),
    ],
)
def test_exactly_the_share_of_the_rows_has_the_value(rule, attribute, value, count):
    dataset = train(f"?skew={rule}")
    assert len(dataset) == 20 and share_with(dataset, attribute, value) == count


def test_skewed_rows_are_the_world_s_in_its_order():
    many = content(drawn.drawn_dataset("doodles", "train", size=SIZE, n=20 * recipes.DRAWN_FOR_SKEW))
    places = [many.index(row) for row in content(drawn_by(SKEW, "train", SIZE, 20))]
    assert places == sorted(set(places))


def test_a_skewed_choice_can_be_shuffled_too():
    skewed = train("?skew=background:pink:0.75")
    both = train("?skew=background:pink:0.75&shuffled=0.5")
    assert without_text(both) == without_text(skewed) and len(moved_rows(both, skewed)) == 10


def test_an_attribute_that_no_scene_has_is_refused():
    with pytest.raises(ValueError, match="scenes have no attribute 'moustache'"):
        train("?skew=moustache:red:0.5")


@pytest.mark.parametrize("rule", ["background:pink", "background", "", "background:pink:most"])
def test_a_skew_without_a_share_is_refused(rule):
    with pytest.raises(ValueError, match="a share in"):
        train(f"?skew={rule}")


@pytest.mark.parametrize("rule", ["background:mauve:0.5", "seed:3:0.1"])
def test_a_share_that_cannot_be_reached_is_refused(rule):
    with pytest.raises(ValueError, match=r"too few scenes for 'doodles\?skew="):
        train(f"?skew={rule}")


def test_a_share_that_the_world_has_too_few_scenes_for_is_refused(monkeypatch):
    monkeypatch.setattr(recipes, "DRAWN_FOR_SKEW", 1)
    with pytest.raises(ValueError, match=r"background is 'pink' in [1-9] of 20"):
        train("?skew=background:pink:0.75")


# --- held-out rows and fingerprints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", ["?shuffled=1", "?skew=background:pink:0.75", f"{SKEW[7:]}&shuffled=0.5"])
def test_held_out_rows_are_never_changed(changes):
    plain = drawn.drawn_dataset("doodles", "held_out", size=SIZE, n=12)
    assert content(drawn_by(f"doodles{changes}", "held_out", SIZE, 12)) == content(plain)


def test_fingerprints_differ_between_changes():
    places = ["doodles", "doodles?shuffled=0.1", "doodles?shuffled=0.2", SKEW, f"{SKEW}&shuffled=0.1"]
    assert len({fingerprint(place, "train", SIZE, 20) for place in places}) == len(places)
    specs = [DatasetSpec("doodles", f"drawn:{place}", train_rows=20, held_out_rows=4) for place in places]
    assert len({data_fingerprint(spec, SIZE) for spec in specs}) == len(places)


def test_without_changes_the_fingerprint_is_the_world_s():
    assert fingerprint("doodles", "train", SIZE, 20) == drawn.fingerprint("doodles", "train", SIZE, 20)
    assert fingerprint("doodles?", "train", SIZE, 20, 3) == drawn.fingerprint("doodles", "train", SIZE, 20, 3)
    specs = [DatasetSpec("doodles", f"drawn:doodles{end}", train_rows=20, held_out_rows=4) for end in ("", "?")]
    assert len({data_fingerprint(spec, SIZE) for spec in specs}) == 1


def test_the_order_of_the_changes_does_not_matter():
    one, other = (f"doodles?{a}&{b}" for a, b in [("shuffled=0.1", SKEW[8:]), (SKEW[8:], "shuffled=0.1")])
    assert fingerprint(one, "train", SIZE, 20) == fingerprint(other, "train", SIZE, 20)
    assert content(drawn_by(one, "train", SIZE, 20)) == content(drawn_by(other, "train", SIZE, 20))


def test_load_pictures_knows_the_changes():
    spec = DatasetSpec("doodles", "drawn:doodles?shuffled=0.5", train_rows=20, held_out_rows=12)
    assert content(load_pictures(spec, "train", SIZE)) == content(train("?shuffled=0.5"))
    assert len(load_pictures(spec, "held_out", SIZE)) == 12
