"""The pictures and captions of a dataset by one name: a hash, or a commit of the hub."""

from __future__ import annotations

from helpers.base import provenance
from helpers.base.provenance import digest
from helpers.data import loading as data
from helpers.data.folders import find_path, visible_paths
from helpers.presets.configuration import DatasetSpec


def data_fingerprint(spec: DatasetSpec, resolution: int) -> str:
    """Names the pictures and captions: a hash of their recipe, of the folder's bytes, or the hub's commit."""
    kind, _, where = spec.source.partition(":")
    if kind == "drawn":
        from helpers.data.recipes import fingerprint

        parts = [fingerprint(where, "train", resolution, spec.train_rows, 0)]
        parts += [fingerprint(where, "held_out", resolution, spec.held_out_rows, 0)] if spec.held_out_rows else []
        return digest(parts)
    rows = [spec.image_column, spec.text_column, spec.train_rows, spec.held_out_rows, spec.split]
    rows += [spec.caption] if spec.caption else []
    if kind in ("folder", "parquet", "hub"):
        copy = data.hub_copy(spec) if kind == "hub" else None
        if copy and copy.commit:
            return digest([spec.source, copy.commit, *rows])
        root = copy.folder if copy else find_path(where)
        paths = [root] if root.is_file() else [path for path in visible_paths(root) if path.is_file()]
        files = [(path.relative_to(root).as_posix(), provenance.file_hash(path)) for path in paths]
        return digest([files, *rows])
    raise data.DataError(f"unknown source {spec.source!r}")
