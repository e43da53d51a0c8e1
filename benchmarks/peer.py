"""TRL's DPOTrainer on the task, with its defaults or tuned; only settings that would change the step are set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import load_dataset
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks import meter
from benchmarks.world import PAIRS, Task

CONFIGS = Path(__file__).resolve().parent.parent / "deepspeed_configs"


class _Marks(TrainerCallback):
    def __init__(self) -> None:
        self.at: list[meter.Mark] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.at.append(meter.Mark.now())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        # Fetching the batch and logging fall between two of these, so they count.
        self.at.append(meter.Mark.now())


class _Trainer(DPOTrainer):
    """A trainer that takes the pairs in the data's order and records each step's loss and the first pass's time."""

    first_pass: dict[str, float] | None = None

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        start = meter.Mark.now()
        result = super()._precompute_ref_logps(*args, **kwargs)
        self.first_pass = meter.Mark.now().since(start)
        return result

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss


def _zero3() -> dict[str, Any]:
    """Return our own ZeRO-3 settings with what the trainer knows better left to it."""
    settings: dict[str, Any] = json.loads((CONFIGS / "policy_zero3.json").read_text())
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    settings["zero_optimization"] |= dict.fromkeys(sizes, "auto")
    left = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return settings | dict.fromkeys(left, "auto")


def run(task: Task, folder: Path, tuned: bool) -> dict[str, Any]:
    """Train on the task; return times, memory and the loss of each step."""
    # From a file, since ranks share what the trainer's library keeps of a data set in files alone.
    data = load_dataset("json", data_files=str(folder / PAIRS), split="train")
    marks = _Marks()
    # bf16 and gradient checkpointing are on by default in TRL; bf16 has no gain in float32 on a CPU.
    options: dict[str, Any] = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if tuned else {}
    if task.ranks > 1:
        options["deepspeed"] = _zero3()
        if task.device == "cpu":  # left to itself, accelerate takes each rank for the only one
            PartialState(backend="gloo")
            options["accelerator_config"] = {"use_configured_state": True}
    config = DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=task.pairs // task.ranks,
        beta=task.beta,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=task.max_grad_norm,
        max_length=None,
        num_train_epochs=1,
        bf16=task.device == "cuda",
        use_cpu=task.device == "cpu" and task.ranks == 1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    baseline = meter.start_peak()
    _Trainer.losses = []
    trainer = _Trainer(
        model=str(folder / "model"),
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[marks],
    )
    trainer.train()
    steps = [later.since(earlier) for earlier, later in zip(marks.at, marks.at[1:], strict=False)]
    losses = torch.stack(_Trainer.losses)
    if task.ranks > 1:
        torch.distributed.all_reduce(losses)
    return {
        "losses": (losses / task.ranks).tolist(),
        "steps": steps,
        "first_pass": trainer.first_pass,
        "baseline": baseline,
        "peak": meter.peak(),
        "threads": torch.get_num_threads(),
    }
