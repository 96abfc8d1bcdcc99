"""What is said of a GPU that torch cannot use, or whose memory does not suffice. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from helpers.base import errors
from helpers.cli import parser as cli
from helpers.course import notebooks
from helpers.presets import machine
from helpers.presets.memory import MEMORY
from helpers.presets.variants import get_preset
from helpers.training.guards import memory_errors
from helpers.training.runs import TrainingError


@pytest.fixture
def with_driver(monkeypatch):
    """A machine with an NVIDIA GPU that torch does not see."""
    monkeypatch.setattr(machine, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_torch_without_cuda_on_a_machine_with_a_gpu(with_driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in machine.gpu_problem()
    assert "pytorch.org/get-started" in machine.gpu_problem()


def failing(message):
    def init():
        raise RuntimeError(message)

    return init


def test_a_driver_that_is_too_old(with_driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    old = "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(torch.cuda, "init", failing(old))
    assert "driver of this machine is too old" in machine.gpu_problem() and "CUDA 12.8" in machine.gpu_problem()
    monkeypatch.setattr(torch.cuda, "init", failing("CUDA unknown error\nmore of it"))
    assert machine.gpu_problem() == "torch cannot use the NVIDIA GPU of this machine: CUDA unknown error"


def test_a_hidden_gpu(with_driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for init in (failing("No CUDA GPUs are available"), lambda: None):
        monkeypatch.setattr(torch.cuda, "init", init)
        assert "CUDA_VISIBLE_DEVICES" in machine.gpu_problem()


def test_no_problem_without_a_gpu_and_with_one_that_works(monkeypatch):
    monkeypatch.setattr(machine, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.gpu_problem() is None
    monkeypatch.setattr(machine, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.gpu_problem() is None


def test_out_of_memory_names_the_next_variant_that_takes_less():
    assert machine.next_lower("sd21-base") == "sd21-base@16gb", "24 GB take all of a batch at once"
    assert machine.next_lower("sd21") == "sd21@24gb", "of larger pictures they do not"
    assert machine.next_lower("sd21@16gb") == "sd21@12gb" and machine.next_lower("sd15@fp16@12gb") == "sd15@8gb@fp16"
    assert machine.next_lower("sd21-base@8gb") is None and machine.next_lower("mini") is None
    assert "--preset sd21-base@16gb" in machine.out_of_memory("sd21-base")
    assert "--preset sd21-base@8gb@256px" in machine.out_of_memory("sd21-base@8gb")
    assert "--preset sd21@8gb@512px" in machine.out_of_memory("sd21@8gb")
    assert "--preset sd21-base@8gb@trial@128px" in machine.out_of_memory("sd21-base@8gb@256px@trial")


@pytest.mark.parametrize("preset", ["mini", "smoke", "sd21-base@8gb@128px"])
def test_advice_can_be_followed(preset):
    """Where no variant takes less, none is named."""
    assert "--preset" not in machine.out_of_memory(preset) and "nvidia-smi" in machine.out_of_memory(preset)


@pytest.mark.parametrize("preset", ["sd21-base", "sd21@24gb", "sd15@12gb@fp16@trial", "sd15@8gb", "sd21@8gb@256px"])
def test_the_advised_preset_exists_and_takes_less(preset):
    advised = machine.out_of_memory(preset).partition("--preset ")[2].partition(",")[0]
    given, other = get_preset(preset), get_preset(advised)
    assert other.resolution < given.resolution or machine.next_lower(preset) == advised


def test_each_lower_variant_computes_no_more_at_once():
    """And the same batch: what an optimizer step averages over does not change."""
    for name in ("sd21-base", "sd21", "sd15"):
        whole, parts = get_preset(name).train, []
        for rung in MEMORY:
            train = get_preset(f"{name}@{rung}").train
            assert (train.batch_size, train.steps, train.rank) == (whole.batch_size, whole.steps, whole.rank)
            parts.append((train.batch_size // train.gradient_accumulation_steps, not train.gradient_checkpointing))
        assert parts == sorted(parts, reverse=True) and len(set(parts)) >= 3


def test_training_tells_which_settings_take_less():
    preset = get_preset("sd21-base@24gb")
    with pytest.raises(TrainingError, match="--preset sd21-base@16gb") as told, memory_errors(preset):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert isinstance(told.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("message", [
    "MPS backend out of memory (MPS allocated: 9.06 GB, other allocations: 10.1 MB, max allowed: 9.07 GB). Tried to …",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate …",
    "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
])  # fmt: skip
def test_an_apple_gpu_and_a_cpu_raise_a_plain_error_when_memory_is_out(message, monkeypatch, capsys):
    with pytest.raises(TrainingError, match="--preset sd21-base@"), memory_errors(get_preset("sd21-base")):
        raise RuntimeError(message)

    def run(given):
        raise RuntimeError(message)

    monkeypatch.setattr(cli, "sample_pictures", run)
    assert cli.main(["sample", "--preset", "sd21-base", "--prompt", "a cat"]) == 1
    assert "course: the memory does not suffice: take --preset" in capsys.readouterr().err


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes") as told, memory_errors(get_preset("sd21-base")):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not isinstance(told.value, TrainingError)
    with pytest.raises(TrainingError, match="written here"), memory_errors(get_preset("sd21-base")):
        raise TrainingError("a sentence written here")


def test_the_command_line_tells_it_too(monkeypatch, capsys):
    def run(given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(cli, "sample_pictures", run)
    assert cli.main(["sample", "--preset", "sd21-base@16gb", "--prompt", "a cat"]) == 1
    assert "course: the memory does not suffice: take --preset sd21-base@8gb" in capsys.readouterr().err


def test_stable_diffusion_on_a_cpu_is_announced(monkeypatch):
    monkeypatch.setattr(machine, "default_device", lambda: "cpu")
    assert "takes minutes for a picture" in machine.notes_without_gpu(get_preset("sd15"))[0]
    assert machine.notes_without_gpu(get_preset("sd15@trial")) == machine.notes_without_gpu(get_preset("mini")) == []
    monkeypatch.setattr(machine, "default_device", lambda: "cuda")
    assert machine.notes_without_gpu(get_preset("sd15")) == []
    monkeypatch.setattr(machine, "default_device", lambda: "mps")
    shared, fallback = machine.notes_without_gpu(get_preset("sd15"))
    assert "Apple GPU" in shared and "float32" in shared and "PYTORCH_ENABLE_MPS_FALLBACK=1" in fallback
    assert machine.notes_without_gpu(get_preset("mini")) == []


def test_a_notebook_that_runs_out_of_memory_tells_it_too(tmp_path):
    path = tmp_path / "01_hungry.ipynb"
    cells = [new_code_cell("PRESET = 'mini'", metadata={"tags": ["parameters"]})]
    cells.append(new_code_cell("import torch\nraise torch.OutOfMemoryError('CUDA out of memory. Tried to …')"))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebooks.write(new_notebook(cells=cells, metadata=kernel), path)
    with pytest.raises(errors.CourseError, match=r"01_hungry.ipynb failed .*take --preset sd15@12gb@trial@256px"):
        notebooks.execute(path, tmp_path / "out.ipynb", {"PRESET": "sd15@12gb@trial"})


def test_a_cell_that_trains_stable_diffusion_has_hours():
    assert notebooks.cell_timeout("mini") == notebooks.cell_timeout("smoke") == notebooks.TIMEOUT <= 3600
    assert notebooks.cell_timeout("sd21-base@16gb") == notebooks.cell_timeout("sd15") >= 12 * 3600


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_machine_whose_memory_does_not_suffice_is_told_what_does(device, monkeypatch):
    def notes(name, gib):
        monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=gib * 2**30))
        return [note for note in machine.notes_without_gpu(get_preset(name)) if "its kernel may die" in note]

    monkeypatch.setattr(machine, "default_device", lambda: device)
    (told,) = notes("sd21-base", 16)
    assert "takes about 20 GiB, and this machine has 16: take --preset sd21-base@8gb@256px" in told
    assert notes("sd21-base", 32) == notes("sd21-base@8gb@256px", 16) == notes("mini", 1) == []
    assert "take MiniSD" in notes("sd21-base@8gb@256px", 4)[0]


def test_a_kernel_that_died_of_stable_diffusion_is_told_what_takes_less(tmp_path, monkeypatch):
    import papermill
    from nbclient.exceptions import DeadKernelError

    def died(*given, **settings):
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(papermill, "execute_notebook", died)
    path = tmp_path / "01_hungry.ipynb"
    cells = [new_code_cell("PRESET = 'mini'", metadata={"tags": ["parameters"]})]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebooks.write(new_notebook(cells=cells, metadata=kernel), path)
    with pytest.raises(errors.CourseError, match="its kernel died; if that was for .*take --preset sd15@8gb@256px"):
        notebooks.execute(path, tmp_path / "out.ipynb", {"PRESET": "sd15@8gb"})
