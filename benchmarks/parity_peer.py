"""TRL's losses on given rows, with TRL's own tokenising, collating and loss, as one batch without a step."""

from __future__ import annotations

from importlib.metadata import version as _version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks.parity_cases import Rows, Value
from benchmarks.world import text


def version() -> str:
    """Return TRL's version."""
    return _version("trl")


class Peer:
    """A policy and a reference, and TRL's losses on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
        self.common: dict[str, Any] = {
            "output_dir": str(folder / "out"),
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "max_length": 512,
            "report_to": [],
            "disable_tqdm": True,
        }

    def dpo(self, rows: Rows, loss_type: list[str], beta: float, **options: Any) -> Value:
        """Return DPOTrainer's loss of the pairs as one batch."""
        config = DPOConfig(loss_type=loss_type, beta=beta, **options, **self.common)
        trainer = DPOTrainer(
            model=self._model("policy"),
            ref_model=self._model("reference"),
            args=config,
            train_dataset=_pairs(rows),
            processing_class=self.tokenizer,
        )
        return _value(trainer, trainer.compute_loss(trainer.model, _batch(trainer)))

    def cpo(self, rows: Rows, **options: Any) -> Value:
        """Return CPOTrainer's loss without its likelihood term, which is over prompt and response."""
        config = CPOConfig(cpo_alpha=0.0, **options, **self.common)
        trainer = self._reference_free(CPOTrainer, config, rows)
        return _value(trainer, trainer.compute_loss(trainer.model, _batch(trainer)))

    def orpo(self, rows: Rows, beta: float) -> Value:
        """Return ORPOTrainer's loss without its likelihood term, which is over prompt and response."""
        trainer = self._reference_free(ORPOTrainer, ORPOConfig(beta=beta, **self.common), rows)
        chosen, rejected = trainer.concatenated_forward(trainer.model, _batch(trainer))[:2]
        weighted, *_ = trainer.odds_ratio_loss(chosen, rejected)
        return _value(trainer, -weighted.mean())

    def kto(
        self, rated: list[tuple[list[int], list[int], bool]], beta: float, undesirable_weight: float, loss_type: str
    ) -> tuple[float, Value]:
        """Return KTOTrainer's reference point and loss of the rows as one batch."""
        rows = Dataset.from_list(
            [{"prompt": text(p) + " ", "completion": text(c), "label": label} for p, c, label in rated]
        )
        config = KTOConfig(
            beta=beta,
            loss_type=loss_type,
            undesirable_weight=undesirable_weight,
            per_device_train_batch_size=len(rated),
            **self.common,
        )
        trainer = KTOTrainer(
            model=self._model("policy"),
            ref_model=self._model("reference"),
            args=config,
            train_dataset=rows,
            processing_class=self.tokenizer,
        )
        trainer.model.train()  # its metrics are read below; the model has no dropout
        value = _value(trainer, trainer.compute_loss(trainer.model, _batch(trainer)))
        found = trainer._metrics["train"].get("kl", [0.0])
        return found[-1], value

    def _reference_free(self, trainer: Any, config: Any, rows: Rows) -> Any:
        return trainer(
            model=self._model("policy"), args=config, train_dataset=_pairs(rows), processing_class=self.tokenizer
        )

    def _model(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)


def _pairs(rows: Rows) -> Dataset:
    return Dataset.from_list([{"prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)} for p, c, r in rows])


def _batch(trainer: Any) -> Any:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def _value(trainer: Any, loss: torch.Tensor) -> Value:
    loss.backward()
    return Value(
        loss.item(), {n: p.grad.double().clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    )
