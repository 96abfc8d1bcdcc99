"""The base model's weights by one name: a hash, or a revision of the hub."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from helpers.base import hub, provenance
from helpers.base.provenance import digest
from helpers.diffusion import components
from helpers.presets.configuration import Preset


def weights_fingerprint(preset: Preset, parts: components.Components | None = None) -> str:
    """Names the base model's weights: their hash, or repository@revision, which the hub guarantees not to change.

    Mirrors hold the same weights, so that it does not matter which of them was there. A copy of one's own
    (COURSE_LOCAL) may be anything, and is hashed.
    """
    if parts is not None:
        modules = {"unet": parts.unet, "vae": parts.vae, "text_encoder": parts.text_encoder}
        state = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
        return provenance.tensor_hash(state)
    if preset.model_folder is None:
        own = hub.find_local(preset.repositories)
        return own_copy_hash(own.folder) if own else f"{preset.model}@{preset.revision}"
    if not preset.model_folder.is_dir():
        raise components.ComponentsError(
            f"the base model of preset {preset.name!r} is missing: no folder {preset.model}. "
            "MiniSD's weights come with the repository; restore them with git, or train them with "
            "`python -m helpers.minisd.pretrain`."
        )
    return provenance.folder_weights_hash(preset.model_folder)


def own_copy_hash(folder: Path) -> str:
    """SHA-256 (hex) of the files of a model that are read, and of no other that lies beside them."""
    unet = components.UNET if (folder / components.UNET).is_file() else components.UNET_FP16
    needed = [*components.NEEDED, unet]
    alternatives = [folder / file for names in needed for file in names.split("|")]
    files = sorted({path for path in alternatives if path.is_file()})
    stats = [path.stat() for path in files]
    return _hash_files(folder, tuple(files), tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache
def _hash_files(folder: Path, files: tuple[Path, ...], stamps: tuple) -> str:
    """They have some GB, so they are read again only when their times or sizes have changed."""
    return digest([(path.relative_to(folder).as_posix(), provenance.file_hash(path)) for path in files])
