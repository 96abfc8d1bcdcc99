"""Hashes of code and weights, versions, atomic writes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from helpers.base import provenance
from helpers.base.files import atomic_path, write_json_atomic
from helpers.base.provenance import code_hash, folder_weights_hash, tensor_hash, versions

SOURCE = '''"""A module."""
import math

UNIT = 1

def area(r, scale=None):
    """Area of a circle."""
    return math.pi * r**2  # square units

class Shape:
    """A shape."""
    sides = 4
    def name(self): return f"shape {self.sides!r:>4}"
'''


def hash_of(tmp_path, source):
    file = tmp_path / "shape.py"
    file.write_text(source)
    return code_hash(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""\n', ""),
        ('    """Area of a circle."""\n', ""),
        ("Area of a circle", "The area"),
        ("  # square units", ""),
        ("import math\n", "import math\n\n\n# constants\n"),
        ('f"shape {self.sides!r:>4}"', "f'shape {self.sides!r:>4}'"),
        ("(r, scale=None)", "(\n    r,\n    scale=None,\n)"),
        ("(r, scale=None):", "(r: float, scale: float | None = None) -> float:"),
        ("UNIT = 1", "UNIT: int = 1"),
    ],
)
def test_code_hash_ignores_what_does_nothing(tmp_path, old, new):
    assert old in SOURCE
    assert hash_of(tmp_path, SOURCE.replace(old, new)) == hash_of(tmp_path, SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("r**2", "r**3"),
        ("r**2", "r**2.0"),
        ("sides = 4", "sides = '4'"),
        ("scale=None", "scale=0"),
        ("scale=None", "scale"),
        ("import math", "import cmath as math"),
        ("!r:>4", "!s:>4"),
        ("!r:>4", "!r:>5"),
        ("sides = 4", "edges = 4"),
        ("sides = 4", "sides: int = 4"),  # of a dataclass it would be a field
        ("math.pi * r", "r * math.pi"),
    ],
)
def test_code_hash_sees_every_change_of_behaviour(tmp_path, old, new):
    assert old in SOURCE
    assert hash_of(tmp_path, SOURCE.replace(old, new)) != hash_of(tmp_path, SOURCE)


def test_code_hash_is_the_same_for_every_python_version(tmp_path):
    """A fixed value: the hash may not move with the interpreter, or a reference run would match on one version only."""
    assert hash_of(tmp_path, SOURCE) == "7e92a325e0e0fdedfca66e64826a7f010b364d487dd630718f93316fb682bd55"


def test_code_hash_takes_modules_names_files_and_folders(tmp_path):
    file = provenance.__file__
    assert code_hash(provenance) == code_hash("helpers.base.provenance") == code_hash(file)
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    (package / "one.py").write_text("y = 1\n")
    before = code_hash(package)
    assert code_hash(package, provenance) == code_hash(provenance, package) != before
    only = code_hash(package / "__init__.py")
    assert only == code_hash(str(package / "__init__.py")) != code_hash(package), "a path is one file"
    (package / "two.py").write_text("z = 1\n")
    assert code_hash(package) != before
    (package / "two.py").write_text("y = 2\n")
    assert code_hash(package) != before


def test_moving_code_does_not_change_its_hash(tmp_path):
    """A file moved or renamed, a definition moved to another of the files, an import that follows it: the same code."""
    one = "import math\nfrom math import pi, tau\nfrom helpers.a import g\n\ndef f(x):\n    return g(x) + math.e\n"
    other = "__all__ = ['g']\ndef g(x):\n    from .c import h\n    return h(x)\n"
    before = code_hash(*_written(tmp_path / "before", {"one.py": one, "a.py": other}))
    follows = one.replace("helpers.a", "helpers.room.a")
    for number, files in enumerate(
        (
            {"a.py": one, "one.py": other},
            {"room/__init__.py": "", "room/one.py": follows, "room/a.py": other.replace(".c", "..room.c")},
            {"one.py": "import math\nfrom math import tau\n", "all.py": f"{other}{follows}"},
            {"one.py": one, "a.py": other.replace("['g']", "['f', 'g']")},
            {
                "one.py": f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from helpers.a import T\n{one}",
                "a.py": other,
            },
        )
    ):
        found = _written(tmp_path / str(number), files)
        extra = "from typing import TYPE_CHECKING\n" if number == 4 else ""
        expected = code_hash(*_written(tmp_path / f"{number}x", {"one.py": extra + one, "a.py": other}))
        assert code_hash(*found) == expected and (extra or expected == before), files
    for change in (
        ("pi, tau", "pi, e"),
        ("import g", "import h as g"),
        ("g(x)", "g(-x)"),
        ("import math", "import cmath"),
    ):
        changed = {"one.py": one.replace(*change), "a.py": other}
        assert code_hash(*_written(tmp_path / f"c{change[1]}", changed)) != before, change


def _written(folder, files):
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return [folder / name for name in files]


def test_code_hash_without_code(tmp_path):
    for target in (tmp_path / "absent.py", "helpers.absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="no (module|code)"):
            code_hash(target)


def test_tensor_hash_sees_name_dtype_shape_and_bytes():
    w = torch.arange(6.0).reshape(2, 3)
    same = tensor_hash({"a": w, "b": torch.tensor(1)})
    assert tensor_hash({"b": torch.tensor(1), "a": w.t().contiguous().t()}) == same
    one_bit = w.clone()
    one_bit[0, 0] = -0.0
    for other in (w.half(), w.reshape(3, 2), one_bit, w.view(torch.int32)):
        assert tensor_hash({"a": other, "b": torch.tensor(1)}) != same
    assert tensor_hash({"a": w, "c": torch.tensor(1)}) != same
    assert tensor_hash({"a": torch.zeros(0, 2)}) != tensor_hash({"a": torch.zeros(2, 0)})


def saved_model(folder, metadata=None, config=None, name="model", **tensors):
    (folder / "unet").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    tensors = tensors or {"w": torch.ones(2), "b": torch.zeros(3)}
    save_file(tensors, folder / "unet" / f"{name}.safetensors", metadata=metadata)
    (folder / "unet" / "config.json").write_text(json.dumps(config or {"width": 64, "_diffusers_version": "1"}))
    (folder / "tokenizer" / "merges.txt").write_bytes(b"a b\nc d\n")
    return folder


def test_folder_hash_ignores_how_the_model_was_saved(tmp_path):
    same = folder_weights_hash(saved_model(tmp_path / "one"))
    two = saved_model(tmp_path / "two", {"by": "x"}, {"_diffusers_version": "2", "width": 64}, b=torch.zeros(3))
    save_file({"w": torch.ones(2)}, two / "unet" / "part-2.safetensors")
    (two / "README.md").write_text("A card.")
    (two / "tokenizer" / "merges.txt").write_bytes(b"a b\r\nc d\r\n")
    assert folder_weights_hash(two) == same


def test_folder_hash_sees_weights_configuration_and_tokenizer(tmp_path):
    same = folder_weights_hash(saved_model(tmp_path / "one"))
    assert folder_weights_hash(saved_model(tmp_path / "two", w=torch.ones(2), b=torch.ones(3))) != same
    assert folder_weights_hash(saved_model(tmp_path / "three", config={"width": 65})) != same
    four = saved_model(tmp_path / "four")
    (four / "tokenizer" / "merges.txt").write_bytes(b"a b\nc e\n")
    assert folder_weights_hash(four) != same


def test_folder_hash_needs_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        folder_weights_hash(tmp_path)


def test_versions_name_what_is_installed():
    found = versions()
    assert list(found) == ["python", "torch", "diffusers", "transformers", "device"]
    assert found["torch"] == torch.__version__ and all(isinstance(v, str) and v for v in found.values())
    assert provenance._version("no-such-package-here") == "not installed"


def test_atomic_path_replaces_a_file_only_on_success(tmp_path):
    target = tmp_path / "deep" / "weights.safetensors"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".safetensors" and temporary.parent == target.parent
        temporary.write_text("old")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(target):
        pass
    with atomic_path(str(target)) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["weights.safetensors"]


def test_atomic_path_replaces_a_folder_whole(tmp_path):
    target = tmp_path / "run"
    for content in ("one", "two"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "two"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_json_atomic(path, {"name": "α", "values": [1, 2.5]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "α", "values": [1, 2.5]}
    assert "α" in path.read_text(encoding="utf-8") and path.read_bytes().endswith(b"}\n")
    for bad, error in (({"x": float("nan")}, ValueError), ({"x": object()}, TypeError)):
        with pytest.raises(error):
            write_json_atomic(path, bad)
    assert json.loads(path.read_text(encoding="utf-8"))["values"] == [1, 2.5]
