"""Where a result comes from: hashes of code and weights, and versions."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Mapping
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
    first = body[0].value if body and isinstance(body[0], ast.Expr) else None
    return body[1:] if isinstance(first, ast.Constant) and isinstance(first.value, str) else body


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


def _is_internal(node: ast.stmt) -> bool:
    """Whether a statement only imports from this library: that says where a definition stands, not what it does."""
    if isinstance(node, ast.ImportFrom):
        own = node.level > 0 or (node.module or "").split(".")[0] == "helpers"
        return own and not any(alias.asname for alias in node.names)  # under another name it is another meaning
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    return False


class _WithoutInternal(ast.NodeTransformer):
    """Takes the library's own imports out of a syntax tree, those inside functions too."""

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt) and _is_internal(node):
            return None
        return self.generic_visit(node)


def _normalized(source: str) -> list[str]:
    """What each top-level statement of a source does, as text.

    Comments, docstrings, annotations, layout, quote characters, `__all__` and imports from the library itself leave no
    trace.
    """
    tree = _WithoutInternal().visit(ast.parse(source))
    body = [node for node in _without_docstring(tree.body) if not _is_listing(node)]
    return [_dump(part) for node in body for part in _single_imports(node)]


def _single_imports(node: ast.stmt) -> list[ast.stmt]:
    """`from a import b, c` as one statement a name, so that it does not matter which file imports which of them."""
    if isinstance(node, ast.Import):
        return [ast.Import([alias]) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [ast.ImportFrom(node.module, [alias], node.level) for alias in node.names]
    return [node]


def _is_listing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


def _module_file(module: ModuleType | str) -> Path:
    """The file of a module, given itself or by its dotted name."""
    spec = module.__spec__ if isinstance(module, ModuleType) else importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"there is no module {module!r} to hash")
    return Path(spec.origin)


def _python_files(target: ModuleType | Path | str) -> list[Path]:
    """The files of a module, a dotted module name, a .py file, or a folder or package (all .py in it)."""
    if isinstance(target, Path) or (isinstance(target, str) and (target.endswith(".py") or Path(target).is_dir())):
        path = Path(target)  # an __init__.py too is one file: whoever lists files may have left out others beside it
    else:
        path = _module_file(target)
        path = path.parent if path.name == "__init__.py" else path
    if not path.exists():
        raise FileNotFoundError(f"there is no code at {path} to hash")
    return [path] if path.is_file() else list(path.rglob("*.py"))


def code_hash(*modules_or_paths: ModuleType | Path | str) -> str:
    """SHA-256 (hex) of what the given code does: of its top-level statements, in whatever files and order they stand.

    Takes modules, dotted module names, .py files, and folders or packages (every .py file below them; but the path of
    an `__init__.py` is that one file). Comments, docstrings, annotations, layout and the Python version leave it as it
    is; so do moving or renaming a file, moving a definition from one of the files to another, and imports from the
    library itself. Every other edit changes it. (Of two files that define one name, it does not see which is imported.)
    Raises FileNotFoundError when there is nothing to hash, SyntaxError for a file that is not Python.
    """
    files = {file.resolve() for target in modules_or_paths for file in _python_files(target)}
    if not files:
        raise FileNotFoundError("there is no code to hash")
    statements = {text for file in files for text in _normalized(file.read_text(encoding="utf-8"))}
    digests = sorted(hashlib.sha256(text.encode()).hexdigest() for text in statements)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


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


def digest(obj: object) -> str:
    """SHA-256 (hex) of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()
