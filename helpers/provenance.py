"""Where a result comes from: hashes of code and weights, versions, and files that are written whole or not at all."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Fields that differ between Python versions or say nothing about what the code does.
_SKIPPED_FIELDS = {"annotation", "ctx", "kind", "returns", "type_comment", "type_ignores"}
# Entries that saving a model rewrites although the model stays the same.
_VOLATILE_CONFIG = {
    "_diffusers_version",
    "transformers_version",
    "_name_or_path",
    "_commit_hash",
    "torch_dtype",
    "dtype",
}


# ---------------------------------------------------------------------------------------------------------- code
def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_docstring and isinstance(first.value.value, str) else body  # type: ignore[union-attr]


def _dump(node: Any, in_class: bool = False) -> str:
    """The syntax tree as text, equal for every Python version (the format of `ast.dump` is not)."""
    if isinstance(node, list):
        return f"[{','.join(_dump(item, in_class) for item in node)}]"
    if not isinstance(node, ast.AST):
        return f"{type(node).__name__}:{node!r}"
    if isinstance(node, ast.AnnAssign) and node.value is not None and not in_class:  # there it may make a field
        node = ast.Assign([node.target], node.value)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, _DOCUMENTED):
            value = _without_docstring(value)
        if name in _SKIPPED_FIELDS or value == [] or (value is None and not isinstance(node, ast.Constant)):
            continue
        fields.append(f"{name}={_dump(value, isinstance(node, ast.ClassDef))}")
    return f"{type(node).__name__}({','.join(fields)})"


def _normalized(source: str) -> str:
    """What the source does, as text: comments, docstrings, annotations, layout and quote characters leave no trace."""
    return _dump(ast.parse(source))


def _module_file(module: ModuleType | str) -> Path:
    """The file of a module, given itself or by its dotted name."""
    if isinstance(module, ModuleType):
        return Path(module.__file__)  # type: ignore[arg-type]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"there is no module {module!r} to hash")
    return Path(spec.origin)


def _python_files(target: ModuleType | Path | str) -> list[tuple[str, Path]]:
    """(name, file) pairs for a module, a dotted module name, a .py file, or a folder or package (all .py in it)."""
    if isinstance(target, Path) or (isinstance(target, str) and (target.endswith(".py") or Path(target).is_dir())):
        path = Path(target)  # an __init__.py too is one file: whoever lists files may have left out others beside it
    else:
        path = _module_file(target)
        path = path.parent if path.name == "__init__.py" else path
    if not path.exists():
        raise FileNotFoundError(f"there is no code at {path} to hash")
    if path.is_file():
        return [(path.name, path)]
    return [(f"{path.name}/{file.relative_to(path).as_posix()}", file) for file in path.rglob("*.py")]


def code_hash(*modules_or_paths: ModuleType | Path | str) -> str:
    """SHA-256 (hex) of what the given code does.

    Takes modules, dotted module names, .py files, and folders or packages (every .py file below them; but the path of
    an `__init__.py` is that one file). Neither the order of the arguments nor comments, docstrings, annotations,
    layout or the Python version change the hash; every other edit does.
    Raises FileNotFoundError when there is nothing to hash, SyntaxError for a file that is not Python.
    """
    files = sorted({pair for target in modules_or_paths for pair in _python_files(target)})
    if not files:
        raise FileNotFoundError("there is no code to hash")
    digest = hashlib.sha256()
    for name, file in files:
        tree = _normalized(file.read_text(encoding="utf-8"))
        digest.update(f"{name}\0{tree}\0".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- weights
def file_hash(path: Path | str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor_digest(tensor: Any) -> str:
    """SHA-256 of one tensor: dtype, shape and bytes."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _entries_hash(entries: list[tuple[str, str]]) -> str:
    lines = "".join(f"{name}\0{value}\n" for name, value in sorted(entries))
    return hashlib.sha256(lines.encode()).hexdigest()


def tensor_hash(state_dict: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of named tensors: name, dtype, shape and bytes of each, in the order of their sorted names.

    Tensors are hashed instead of files because the same weights can be written to different bytes.
    """
    return _entries_hash([(name, _tensor_digest(tensor)) for name, tensor in state_dict.items()])


def _without_volatile(config: Any) -> Any:
    if isinstance(config, dict):
        return {k: _without_volatile(v) for k, v in config.items() if k not in _VOLATILE_CONFIG}
    return config


def folder_weights_hash(folder: Path | str) -> str:
    """SHA-256 (hex) of a saved model: every tensor, every .json configuration, the tokenizer's merges and vocabulary.

    Sharding, file metadata, documentation, line endings, and the library versions and stored dtype that saving notes
    in a configuration do not change it. Raises FileNotFoundError when the folder holds no .safetensors file.
    """
    from safetensors import safe_open

    folder = Path(folder)
    entries: list[tuple[str, str]] = []
    tensors = 0
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not file.is_file():
            continue
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                names = list(stored.keys())
                entries += [(f"{relative.parent.as_posix()}/{n}", _tensor_digest(stored.get_tensor(n))) for n in names]
            tensors += len(names)
        elif file.suffix == ".json" and not file.name.endswith(".index.json"):
            config = _without_volatile(json.loads(file.read_text(encoding="utf-8")))
            entries.append((relative.as_posix(), json.dumps(config, sort_keys=True)))
        elif file.name in ("merges.txt", "vocab.txt"):
            text = file.read_text(encoding="utf-8")  # universal newlines: \r\n reads as \n
            entries.append((relative.as_posix(), hashlib.sha256(text.encode()).hexdigest()))
    if not tensors:
        raise FileNotFoundError(f"the folder {folder} holds no weights (.safetensors)")
    return _entries_hash(entries)


# ------------------------------------------------------------------------------------------------------ versions
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of Python, torch, diffusers and transformers, and the name of the default device."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        device = f"MPS ({platform.machine()})"
    else:
        device = f"CPU ({platform.machine()})"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "transformers": _version("transformers"),
        "device": device,
    }


# ------------------------------------------------------------------------------------------------- atomic writes
def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces it when the block ends without an exception.

        with atomic_path("runs/x/weights.safetensors") as temporary:
            save_file(tensors, temporary)

    The block writes a file or creates a folder there; parents are created and the suffix is kept. After an exception
    (an interrupt too) the temporary is deleted and what was at `path` stays. A file is replaced in one step. An
    existing folder is first renamed, then replaced, then deleted. Raises FileNotFoundError when nothing was written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    temporary = path.with_name(f".{path.stem}.{token}.tmp{path.suffix}")
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        if temporary.is_dir() and path.is_dir():
            old = path.with_name(f".{path.name}.{token}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            _delete(old)
        else:
            os.replace(temporary, path)
    finally:
        _delete(temporary)


def write_json_atomic(path: Path | str, obj: Any) -> None:
    """Writes `obj` as readable JSON (UTF-8, two spaces, a newline at the end), whole or not at all.

    Raises ValueError for NaN and infinities, which JSON does not have, and TypeError for what JSON cannot say.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
