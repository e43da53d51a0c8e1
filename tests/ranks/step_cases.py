"""Cases of rank_cases.py on single steps: layouts, families, ZeRO stages and idle ranks; values beside float64."""

from pathlib import Path
from typing import Any

import matrix_cases
import pytest
import torch
from float64_steps import equality
from rank_jobs import DPO, KTO, config_for, make_policy, ready
from transformers import LlamaConfig

from prefopt_dist.batching.batches import step_batch
from prefopt_dist.batching.packing import pack
from prefopt_dist.config import Config
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model import head
from prefopt_dist.model.load import load_unsharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.setup import prepare_models
from prefopt_dist.training import step
from prefopt_dist.training.optimizer import adamw
from prefopt_dist.training.stop import Request


def kto(folder: Path) -> dict:
    """The models in this order, since in the other z0 is 0."""
    return equality(folder, "kto", 150, KTO, of="reference", against="model", steps=2)


def dpo_many_micro_batches(folder: Path) -> dict:
    return equality(folder, "dpo-many", 150, DPO)


def dpo_one_micro_batch(folder: Path) -> dict:
    return equality(folder, "dpo-one", 100_000, DPO)


def dpo_checkpointing(folder: Path) -> dict:
    return equality(folder, "dpo-checkpointing", 300, DPO, model={"checkpointing": "all"})


def dpo_small_blocks(folder: Path) -> dict:
    """Some prompts' logits fit into a block, others are made again in the forward pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MAX_LOGITS_PER_BLOCK", 30 * LlamaConfig.from_pretrained(folder / "model").vocab_size)
        return equality(folder, "dpo-blocks", 300, DPO, steps=2)


def pairwise(folder: Path) -> dict:
    return matrix_cases.steps_equal(folder, matrix_cases.pairwise(ranks.world_size()))


def full_matrix(folder: Path) -> dict:
    return matrix_cases.steps_equal(folder, matrix_cases.full())


def sft_many_micro_batches(folder: Path) -> dict:
    return equality(folder, "sft-many", 150, {"name": "sft"})


def ipo(folder: Path) -> dict:
    return equality(folder, "ipo", 150, {"name": "ipo", "beta": 0.3, "average": "tokens"}, steps=2)


def orpo(folder: Path) -> dict:
    return equality(folder, "orpo", 150, {"name": "orpo", "beta": 0.5}, steps=2)


def kto_one_micro_batch(folder: Path) -> dict:
    return equality(folder, "kto-one", 100_000, KTO, of="reference", against="model", steps=1)


def dpo_gemma2(folder: Path) -> dict:
    """Caps, windows and a tied head under ZeRO-3; checkpointing around the attention's own."""
    return equality(folder, "dpo-gemma2", 150, DPO, of="gemma2", steps=2, model={"checkpointing": "all"})


def dpo_phi3(folder: Path) -> dict:
    return equality(folder, "dpo-phi3", 150, DPO, of="phi3", steps=2)


def dpo_stage_2(folder: Path) -> dict:
    """The same module under ZeRO-2: whole parameters on every rank, gradients and optimizer sharded."""
    return equality(folder, "dpo-stage-2", 150, DPO, make_engine=stage_2_engine, steps=2)


def stage_2_engine(config: Config, models: prepare_models.Models) -> Any:
    settings = zero3.policy_settings({"zero_optimization": {"stage": 2}}, dtype=models.dtype, max_grad_norm=None)
    scorer = Scorer(load_unsharded(models.policy, dtype=models.dtype)).train()
    optimizer = adamw(scorer, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    return zero3.policy_engine(scorer, optimizer, settings)


def idle_ranks(folder: Path) -> dict:
    """A step with fewer pairs than ranks: idle ranks take part with weight 0, in KTO's pass before the step too."""
    found: dict[str, Any] = {}
    for name, loss in (("dpo", {"name": "dpo"}), ("kto", KTO)):
        config = config_for(folder, f"idle-{name}", loss=loss)
        models, objective, scored, _ = ready(config)
        engine = make_policy(config, models)
        batch = step_batch(scored, [3], objective.responses, 4096)
        sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
        norm = step.optimizer_step(engine, 1e-3)
        zero3.release(engine)
        found[name] = {"pairs": sums[-1], "loss": sums[0], "norm": float(norm)}
    return found


def packs_alone_and_together(folder: Path) -> dict:
    """A pair scores alone as in a pack with others."""
    config = config_for(folder, "alone", loss={"name": "dpo"})
    models, _, scored, _ = ready(config)
    scorer = Scorer(load_unsharded(models.policy, dtype=torch.float32))
    units = scored.units(range(scored.rows.n), 2)
    with torch.no_grad():
        together = pack(units, 2)
        sums = scorer(together)[together.units]
        alone = torch.cat([scorer(b)[b.units] for b in (pack([Unit(u.row, u.prompt, u.responses)], 2) for u in units)])
    return {"worst": float(((sums - alone).abs() / alone.abs()).max())}
