"""The prompts of validations and figures: {dataset name: prompts} and {figure name: prompts}.

The homework named two of its own: figure 6 follows SD_PORTRAIT through training, figure 7 SD_SHERIFF; figures 5, 8 and
9 begin with them. MiniSD gets their like from the drawn world.
"""

from __future__ import annotations

# Figure 6 follows one prompt through both runs, so both validate it; figure 7 follows the first vintage prompt.
MINI_PORTRAIT = "a drawing of a man with a red scarf"
MINI_SHERIFF = "a bat hero as a sheriff, vintage style"
MINI_VALIDATION: dict[str, tuple[str, ...]] = {
    "doodles": (
        MINI_PORTRAIT,
        "a drawing of a black cat with a yellow crown, on a pink background",
        "a drawing of a woman with red hair and glasses, on a green background",
        "a drawing of a gray robot with a blue bow tie, on a yellow background",
    ),
    "vintage": (
        MINI_SHERIFF,
        MINI_PORTRAIT,
        "a brown dog with a black top hat, on a yellow background, vintage style",
        "a skeleton with a red cowboy hat and sunglasses, on a blue background, vintage style",
    ),
    "lorelei": (
        "an ink drawing of a smiling person with long black hair and glasses, on a pink background",
        "an ink drawing of a person with short black hair and a beard, on a yellow background",
        "an ink drawing of a woman with red hair and sunglasses, on a blue background",
        "an ink drawing of a black cat with a yellow crown, on a green background",
    ),
}
MINI_FIGURES = {
    "fig03": (
        "a drawing of a man with a red scarf",
        "a drawing of a white rabbit with a blue beanie, on a yellow background",
        "a drawing of a green alien with a purple crown, on a pink background",
        "a drawing of an orange cat with glasses and a black bow tie, on a blue background",
    ),
    "fig04": (
        "a bat hero as a sheriff, vintage style",
        "a woman with black hair and a red scarf, on a green background, vintage style",
        "a brown bear with a white cap, on a blue background, vintage style",
        "a blue robot with a yellow top hat, on an orange background, vintage style",
    ),
    "fig05": (
        "a drawing of a bat hero with a red crown, on a yellow background",
        "a drawing of a skeleton with a purple top hat, on a green background",
        "a drawing of a brown dog with a blue scarf, on a pink background",
        "a drawing of a woman with blond hair and sunglasses, on a purple background",
    ),
    "fig06": (MINI_PORTRAIT,),
    "fig07": (MINI_SHERIFF,),
    "fig08": (
        "a drawing of a man with a red scarf",
        "a drawing of a black cat with a yellow crown, on a pink background",
        "a drawing of a green alien with glasses, on an orange background",
        "a drawing of a white rabbit with a black top hat, on a blue background",
    ),
    "fig09": (
        "a bat hero as a sheriff, vintage style",
        "a brown dog with a black top hat, on a yellow background, vintage style",
        "a woman with red hair and a blue scarf, on a green background, vintage style",
        "a gray robot with a red beanie, on a pink background, vintage style",
    ),
}
SD_PORTRAIT = "a drawing of Donald Trump with a scarf"
SD_SHERIFF = "Batman as a sheriff in a vintage style"
SD_VALIDATION: dict[str, tuple[str, ...]] = {
    "doodles": (
        SD_PORTRAIT,
        "a drawing of a black cat with a yellow crown",
        "a drawing of a girl with red hair and glasses",
        "a drawing of a robot with a blue bow tie",
    ),
    "vintage": (
        SD_SHERIFF,
        SD_PORTRAIT,
        "a dog in a top hat, vintage style",
        "a rocket landing on the moon, vintage style",
    ),
}
SD_FIGURES = {
    "fig03": (
        "a drawing of a man with a red scarf",
        "a drawing of a white rabbit with a blue hat",
        "a drawing of an alien with a purple crown",
        "a drawing of a cat with glasses",
    ),
    "fig04": (
        "Batman as a sheriff in a vintage style",
        "a woman with a red scarf, vintage style",
        "a bear riding a bicycle, vintage style",
        "a robot with a top hat, vintage style",
    ),
    "fig05": (
        SD_PORTRAIT,
        "a drawing of Batman with a crown",
        "a drawing of a skeleton with a top hat",
        "a drawing of a dog with a blue scarf",
    ),
    "fig06": (SD_PORTRAIT,),
    "fig07": (SD_SHERIFF,),
    "fig08": (SD_PORTRAIT, *SD_VALIDATION["doodles"][1:]),
    "fig09": (SD_SHERIFF, *SD_VALIDATION["vintage"][2:], "a woman with a red scarf, vintage style"),
}
