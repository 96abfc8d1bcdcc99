"""The ground: paths, errors a reader can mend, files written whole or not at all, hashes, and the Hugging Face hub.

Everything else may stand on it, and it stands on nothing of the course.
"""

from helpers.base.errors import CourseError, DataError
from helpers.base.files import atomic_path, write_json_atomic
from helpers.base.paths import ROOT, runs_folder
from helpers.base.provenance import tensor_hash, versions

__all__ = [
    "CourseError",
    "DataError",
    "ROOT",
    "atomic_path",
    "runs_folder",
    "tensor_hash",
    "versions",
    "write_json_atomic",
]
