"""Makes pictures/lorelei.parquet: 300 portraits from "Lorelei" by Lisa Wischofsky (CC0 1.0), with captions.

    pip install dicebear-core==10.7.0 dicebear-styles==10.6.0
    python -m helpers.data.lorelei

Lorelei is a set of hand-drawn parts of faces. DiceBear puts them together; which parts, we draw by lot and so know
what a picture shows. Brows, eyes, noses and heads, which captions do not mention, are DiceBear's lot. Ours are the
grounds in pastel behind the ink, and the words. The words name no gender, as the artist does not: "a person".
"""

from __future__ import annotations

import io
import json
import random
from importlib.resources import files
from pathlib import Path

FILE = Path(__file__).parent / "pictures" / "lorelei.parquet"
ROWS = 300
SIZE = 128  # pixels on a side

# What a look at all 48 says of the artist's hair; the words are ours.
HAIR = {
    "short black hair": "01 02 03 04 06 07 08 11 12 28 43 47",
    "curly black hair": "05 09 22 39 44",
    "long black hair": "13 15 16 21 23 40 41",
    "wavy black hair": "18 24 32 35 37",
    "messy black hair": "20 30",
    "a black bob": "10 17 19",
    "a black bun": "14 38 45 46",
    "two black buns": "26",
    "a black ponytail": "29 31 33 36 42 48",
    "a black mohawk": "27",
    "a bald head": "25 34",
}
GLASSES = {"glasses": "01 03 04 05", "sunglasses": "02"}
BEARDS = "01 02"
# Mouths that read as such from afar, of those that the artist calls happy and sad.
MOUTHS = {
    "smiling": [f"happy{n}" for n in "01 02 04 05 06 07 09 12 16".split()],
    "frowning": [f"sad{n}" for n in "03 04 05 06 07 08".split()],
}
GROUNDS = {
    "white": "#ffffff",
    "pink": "#f8cfdd",
    "yellow": "#fbe9a4",
    "green": "#b9dfb6",
    "blue": "#aac6ee",
    "purple": "#cdb6e6",
    "orange": "#fbcf9d",
}
# How often a portrait has what is not always there. (There are earrings and freckles too, too small to see here.)
SHARES = {"glasses": 0.25, "sunglasses": 0.1, "beard": 0.2, "flowers": 0.15}


def variants(numbers: str) -> list[str]:
    """DiceBear's names of parts: ["variant01"] from "01"."""
    return [f"variant{number}" for number in numbers.split()]


def portrait(row: int) -> tuple[dict, str]:
    """The options of one portrait for DiceBear, and its caption."""
    rng = random.Random(f"lorelei {row}")
    hair, mouth, ground = (rng.choice(list(choices)) for choices in (HAIR, MOUTHS, GROUNDS))
    eyewear = rng.choices(["", "glasses", "sunglasses"], [0.65, SHARES["glasses"], SHARES["sunglasses"]])[0]
    beard = rng.random() < SHARES["beard"]
    flowers = hair != "a bald head" and rng.random() < SHARES["flowers"]
    options = {
        "seed": f"lorelei {row}",
        "size": SIZE,
        "backgroundColor": [GROUNDS[ground]],
        "hairVariant": [rng.choice(variants(HAIR[hair]))],
        "mouthVariant": [rng.choice(MOUTHS[mouth])],
        "glassesVariant": variants(GLASSES.get(eyewear, "01")),
        "glassesProbability": 100 if eyewear else 0,
        "beardVariant": variants(BEARDS),
        "beardProbability": 100 if beard else 0,
        "hairAccessoriesProbability": 100 if flowers else 0,
        "earringsProbability": 0,
        "frecklesProbability": 0,
    }
    things = [hair, *[eyewear] * bool(eyewear), *["a beard"] * beard, *["white flowers"] * flowers]
    listed = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    # a beard hides the mouth
    who = "a person" if beard else f"a {mouth} person"
    return options, f"an ink drawing of {who} with {listed}, on a {ground} background".replace("a orange", "an orange")


def render(style, options: dict) -> bytes:
    """One portrait as PNG with a palette, which ink on one ground fills with few colours."""
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    drawn = bytes(resvg_py.svg_to_bytes(svg_string=Avatar(style, options).to_string()))
    picture = Image.open(io.BytesIO(drawn)).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    return png.getvalue()


def main() -> None:
    """Write the parquet file, with licence and source in its header."""
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image, Value
    from dicebear import Style

    definition = json.loads(files("dicebear_styles").joinpath("lorelei.json").read_text("utf-8"))
    style = Style(definition)
    rows = [portrait(row) for row in range(ROWS)]
    pictures = [{"bytes": render(style, options), "path": None} for options, _ in rows]
    columns = {"image": pictures, "text": [text for _, text in rows]}
    dataset = Dataset.from_dict(columns, features=Features({"image": Image(), "text": Value("string")}))
    said = {"artist": definition["meta"]["creator"]["name"], "licence": definition["meta"]["license"]["text"]}
    said |= {"source": definition["meta"]["source"]["url"], "made by": "helpers/data/lorelei.py"}
    table = dataset.data.table
    table = table.replace_schema_metadata(dict(table.schema.metadata or {}) | said)
    pq.write_table(table, FILE, compression="zstd")


if __name__ == "__main__":
    main()
