"""The drawn world: scenes (what is in the picture), styles (how it looks), captions and datasets.

scenes.py    a portrait as named attributes, and how to draw one at random
drawing.py   the parts of a portrait as shapes
styles.py    `render`: the same scene as a shaded picture, a pencil sketch, a doodle …
captions.py  the scene in words
datasets.py  captioned pictures as a `datasets.Dataset`
"""
