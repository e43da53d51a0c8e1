"""Sampling with the live ZeRO-3 engine, where no rank has room for a whole copy.

Every layer is gathered for every token, so it is slow (2N bytes over the network a token, whatever the number of
answers); all ranks compute at the same time, each its own batch, and who is done computes along until all are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import DynamicCache

from prefopt_dist.distributed import ranks
from prefopt_dist.model import attention
from prefopt_dist.model.scorer import DecodingInputs
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.rollouts.transformers_engine import TransformersEngine, attention_of


class ShardedEngine(TransformersEngine):
    """The model of a DeepSpeed engine around a Scorer; the same tokens as those of a whole copy, up to rounding."""

    lockstep = True

    def __init__(self, engine: Any, name: str, *, batch_tokens: int, release: bool, nan_ends: bool = False) -> None:
        """release: the engine is this one's own and is given back with it."""
        self._engine = engine
        self._release = release
        self._was_training = engine.module.training
        engine.module.eval()
        lm = engine.module.lm
        super().__init__(lm, name, batch_tokens=batch_tokens, nan_ends=nan_ends)
        self._device = ranks.device()
        lm.set_attn_implementation(attention_of(lm.config))

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        heartbeat.beat("answering under ZeRO-3")  # a token may take seconds, a shard hours
        self._agree(True)
        logits: torch.Tensor = self._engine(DecodingInputs(ids, mask, positions, cache))
        return logits

    def meet(self) -> None:
        """See Engine: passes of one token, until no rank has one of its own."""
        one = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        with torch.no_grad():
            while self._agree(False):
                heartbeat.beat("waiting for others who answer under ZeRO-3")
                self._engine(DecodingInputs(one, one + 1, one, None))

    def _agree(self, more: bool) -> bool:
        """All ranks: whether any of them has a pass to compute; each then computes one."""
        flag = torch.tensor(float(more), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item() > 0)

    def close(self) -> None:
        """See Engine: the model attends as it did before."""
        from prefopt_dist.distributed import zero3

        self._model.set_attn_implementation(attention.NAME)
        self._engine.module.train(self._was_training)
        if self._release:
            zero3.release(self._engine)
        del self._model, self._engine
