"""The training loop: what a step draws and computes, validation, checkpoints, and the run it leaves on the disk.

Begin with full.py, the loop without LoRA; then steps.py and loop.py. The other files guard, show and keep a run.
"""

from helpers.training.checkpoints import keep_checkpoints, load_last_checkpoint, save_checkpoint
from helpers.training.draws import StepDraw, draw_step, generator_for, seeded, steps_per_epoch
from helpers.training.full import full_fine_tuning
from helpers.training.guards import disk_errors, locked, memory_errors
from helpers.training.loop import (
    Loop,
    OnLog,
    load_caches,
    prepare,
    replay,
    train,
    train_and_file,
    train_loop,
    training_forward,
    validate,
)
from helpers.training.progress import Progress
from helpers.training.runs import (
    REFERENCE,
    RUN_FILES,
    Run,
    TrainingError,
    config_key,
    find_run,
    rewind,
    run_config,
    run_dir,
    run_key,
)
from helpers.training.steps import (
    check_finite,
    injected,
    learning_rate,
    new_accelerator,
    part_loss,
    sum_over_processes,
    trained_parts,
    training_step,
)
from helpers.training.tracking import Tracker
from helpers.training.validation import grid_timesteps, held_out_loss, loss_by_timestep, validation_steps

__all__ = [
    "Loop",
    "OnLog",
    "Progress",
    "REFERENCE",
    "RUN_FILES",
    "Run",
    "StepDraw",
    "Tracker",
    "TrainingError",
    "check_finite",
    "config_key",
    "disk_errors",
    "draw_step",
    "find_run",
    "full_fine_tuning",
    "generator_for",
    "grid_timesteps",
    "held_out_loss",
    "injected",
    "keep_checkpoints",
    "learning_rate",
    "load_caches",
    "load_last_checkpoint",
    "locked",
    "loss_by_timestep",
    "memory_errors",
    "new_accelerator",
    "part_loss",
    "prepare",
    "replay",
    "rewind",
    "run_config",
    "run_dir",
    "run_key",
    "save_checkpoint",
    "seeded",
    "steps_per_epoch",
    "sum_over_processes",
    "train",
    "train_and_file",
    "train_loop",
    "trained_parts",
    "training_forward",
    "training_step",
    "validate",
    "validation_steps",
]
