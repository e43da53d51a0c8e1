"""TRL's DPOTrainer on the task, with its defaults or tuned; only settings that would change the step are set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks import meter
from benchmarks.world import Task, text


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


def run(task: Task, folder: Path, tuned: bool) -> dict[str, Any]:
    """Train on the task; return times, memory and the loss of each step."""
    data = Dataset.from_list(
        [{"prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)} for p, c, r in task.drawn()]
    )
    marks = _Marks()
    # bf16 and gradient checkpointing are on by default in TRL; bf16 has no gain in float32 on a CPU.
    options = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if tuned else {}
    config = DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=task.pairs,
        beta=task.beta,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=task.max_grad_norm,
        max_length=None,
        num_train_epochs=1,
        bf16=task.device == "cuda",
        use_cpu=task.device == "cpu",
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
    return {
        "losses": [x.item() for x in _Trainer.losses],
        "steps": steps,
        "first_pass": trainer.first_pass,
        "baseline": baseline,
        "peak": meter.peak(),
        "threads": torch.get_num_threads(),
    }
