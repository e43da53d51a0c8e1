"""Every family × head × ZeRO stage × checkpointing on real ranks: a step's log-probs and gradients against float64.

The pairs share their prompts by two responses and by more. `pairwise` has one setting of each family on one rank and
its opposite on two; so any two values of any two of the five (ranks among them) stand together somewhere.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import models_for_tests as small
import plain
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from prefopt_dist.batching.layout import lay_out
from prefopt_dist.batching.packing import pack
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model import activation_checkpointing
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.model.load import load_sharded, load_unsharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO
from prefopt_dist.training.optimizer import adamw

BUDGET = 60
"""Tokens of a micro-batch: several on each rank, and prompts that are shared by two responses and by more in one"""
BETA = 0.3


class Setting(NamedTuple):
    family: str
    tied: bool
    stage: int
    checkpointing: bool

    @property
    def model(self) -> str:
        """One of models_for_tests: the last, whose windows and rotary scaling are the odder ones; a long rope is
        refused for folders."""
        found = [n for n, (family, _) in small.MODELS.items() if family == self.family and _tied(n) == self.tied]
        return [n for n in found if "longrope" not in n][-1]


def _tied(name: str) -> bool:
    return bool(small.make(name).config.tie_word_embeddings)


def full() -> list[Setting]:
    return [
        Setting(*of) for of in itertools.product(sorted(small.SHARING_FAMILIES), (False, True), (2, 3), (False, True))
    ]


def pairwise(n: int) -> list[Setting]:
    """Of n ranks, 1 or 2."""
    found = []
    for i, family in enumerate(sorted(small.SHARING_FAMILIES)):
        tied, stage, checkpointing = ((i >> bit & 1) ^ (n - 1) for bit in range(3))
        found.append(Setting(family, bool(tied), 2 + stage, bool(checkpointing)))
    return found


def steps_equal(folder: Path, settings: list[Setting]) -> dict[str, Any]:
    """[worst relative error of a sum, of a tensor's gradient; micro-batches] of each setting."""
    return {"settings": [[*s, *one(folder / f"matrix-{s.model}", s)] for s in settings]}


def one(folder: Path, setting: Setting) -> list[float]:
    units = small.pairs()[:11]
    reference = small.references(units)
    number = {u.row: i for i, u in enumerate(units)}

    def write() -> None:
        if not folder.exists():
            small.make(setting.model).save_pretrained(folder)

    ranks.run_on_rank_zero(write)
    engine = engine_of(folder, setting)
    layout = lay_out(units, ranks.world_size(), BUDGET)
    sums = torch.zeros(len(units), 2, dtype=torch.float64)
    for j, by_rank in enumerate(layout):
        mine = by_rank[ranks.rank()]
        engine.set_gradient_accumulation_boundary(j == len(layout) - 1)
        rows = [number[u.row] for u in mine]
        terms = engine(pack(mine, 2), DPO(BETA), reference[rows])
        engine.backward(terms.loss * ranks.world_size() / len(units))
        sums[rows] = terms.sums
    dist.all_reduce(sums)
    got = {n: safe_get_full_grad(p).double() for n, p in engine.module.lm.named_parameters()}
    zero3.release(engine)

    def beside_exact() -> list[float]:
        exact = plain.build_plain(folder)
        wanted = small.plain_sums(exact, units)
        plain.dpo_loss(wanted, reference, BETA).mean().backward()
        return [small.apart(sums, wanted.detach()), small.worst(got, small.gradients(exact))[0], len(layout)]

    return ranks.run_on_rank_zero(beside_exact)  # once is enough: the other ranks' numbers are the same


def engine_of(folder: Path, setting: Setting) -> Any:
    zero = {"stage": setting.stage, "stage3_param_persistence_threshold": 0} if setting.stage == 3 else {"stage": 2}
    wanted = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}
    settings = zero3.policy_settings(wanted, dtype=torch.float32, max_grad_norm=None)
    model = inspect_folder(folder, "model")
    if setting.stage == 3:
        lm = load_sharded(model, dtype=torch.float32, settings=settings)
    else:
        lm = load_unsharded(model, dtype=torch.float32)
    scorer = Scorer(lm).train()
    optimizer = adamw(scorer, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    engine = zero3.policy_engine(scorer, optimizer, settings)
    activation_checkpointing.apply(lm, lm.config.num_hidden_layers if setting.checkpointing else 0)
    return engine
