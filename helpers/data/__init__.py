"""Captioned pictures: read from folders, parquet files, the hub or the drawn world, and cached as latents.

Whatever the source, a dataset has the columns "image" and "text".
"""

from helpers.data.caches import LatentCache, build_cache, compute_cache
from helpers.data.loading import caption_sentence, describe_captions, load_pictures, read_picture, shape_sentence
from helpers.data.look import look_at
from helpers.data.own import with_own_pictures

__all__ = [
    "LatentCache",
    "build_cache",
    "caption_sentence",
    "compute_cache",
    "describe_captions",
    "load_pictures",
    "look_at",
    "read_picture",
    "shape_sentence",
    "with_own_pictures",
]
