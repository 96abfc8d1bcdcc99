"""The drawn world: scenes, the shapes that make them, nine ways to paint them, captions and datasets.

scenes.py is a portrait as named attributes; `render` in styles.py draws it; captions.py puts it into words.
"""

from helpers.world.captions import caption, prompt
from helpers.world.datasets import drawn_dataset, scene_from_json
from helpers.world.scenes import BASE_STYLES, EXTRA_STYLES, HELD_OUT_STYLES, STYLES, Scene, sample_scene
from helpers.world.styles import render, to_svg

__all__ = [
    "BASE_STYLES",
    "EXTRA_STYLES",
    "HELD_OUT_STYLES",
    "STYLES",
    "Scene",
    "caption",
    "drawn_dataset",
    "prompt",
    "render",
    "sample_scene",
    "scene_from_json",
    "to_svg",
]
