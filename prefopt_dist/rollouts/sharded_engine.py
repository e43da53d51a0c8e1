"""Sampling with the live ZeRO-3 engine, where no rank has enough memory for an unsharded copy.

It is slow, since every layer is gathered for every token: 2N bytes over the network per token for N parameters, however
many answers are sampled. All ranks compute at the same time, each its own batch; a rank that is done takes part in the
passes until all are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import DynamicCache

from prefopt_dist.distributed import ranks
from prefopt_dist.model.load import own_attention
from prefopt_dist.model.scorer import DecodingInputs
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.rollouts.sampling import Ids, pad_lines
from prefopt_dist.rollouts.transformers_engine import TransformersEngine


class ShardedEngine(TransformersEngine):
    """Sampling with a DeepSpeed engine around a Scorer; gives the tokens of an unsharded copy, up to rounding."""

    lockstep = True

    def __init__(self, engine: Any, name: str, *, batch_tokens: int, release: bool, nan_ends: bool = False) -> None:
        """Put the model into evaluation mode and switch its attention to the one that samples.

        Args:
            engine: DeepSpeed's engine around a Scorer.
            name: of the model, for messages.
            batch_tokens: see `batches`.
            release: whether `close` also releases DeepSpeed's engine.
            nan_ends: see TransformersEngine.
        """
        self._engine = engine
        self._release = release
        self._was_training = engine.module.training
        self._attention = engine.module.lm.config._attn_implementation
        engine.module.eval()
        lm = engine.module.lm
        super().__init__(lm, name, batch_tokens=batch_tokens, nan_ends=nan_ends)
        self._device = ranks.device()
        lm.set_attn_implementation(own_attention(lm.config))

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache | None
    ) -> torch.Tensor:
        heartbeat.beat("answering under ZeRO-3")  # a token may take seconds, a shard hours
        self._agree(True)
        logits: torch.Tensor = self._engine(DecodingInputs(ids, mask, positions, cache))
        return logits

    @torch.no_grad()
    def logits_before(self, prompt: Ids, response: Ids) -> torch.Tensor:
        """Return as in TransformersEngine, in one padded pass over all beginnings of the response."""
        lines = [[*prompt, *response[:t]] for t in range(len(response))]
        ids, mask = pad_lines(lines, 0, "left", self._device)
        return self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None).float().cpu()

    def meet(self) -> None:
        """Take part in the other ranks' passes with one token each, until no rank has a pass to compute."""
        one = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        with torch.no_grad():
            while self._agree(False):
                heartbeat.beat("waiting for ranks that answer under ZeRO-3")
                self._engine(DecodingInputs(one, one + 1, one, None))

    def _agree(self, more: bool) -> bool:
        """Return whether any rank has a pass to compute, in which all then take part (all ranks call it)."""
        flag = torch.tensor(float(more), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item() > 0)

    def close(self) -> None:
        """Restore the model's attention and mode, and release the engine if this class owns it."""
        from prefopt_dist.distributed import zero3

        self._model.set_attn_implementation(self._attention)
        self._engine.module.train(self._was_training)
        if self._release:
            zero3.release(self._engine)
        del self._model, self._engine
