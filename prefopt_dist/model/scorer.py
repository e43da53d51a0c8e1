"""The one module under the engine: a micro-batch in, the loss and what the loss is made of out.

The output head is reached in here because only inside the wrapped module's forward does ZeRO-3 gather
its weight with the right gradient.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from prefopt_dist.data.micro_batch import MicroBatch
from prefopt_dist.model.head import attach_logp_head
from prefopt_dist.objectives.objective import Objective, Sequences, Terms


class Scorer(nn.Module):
    """Wraps a causal language model; `lm.` is the only prefix that it adds to parameter names."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        # Gemma's field; the other families have none.
        attach_logp_head(lm.get_output_embeddings(), lm.config.to_dict().get("final_logit_softcapping"))

    def sequence_sums(self, batch: MicroBatch) -> torch.Tensor:
        """float64 [Q]: Σ log π(response token | prompt, response so far) of each sequence."""
        hidden = self.lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            gathered=batch.gathered,
            use_cache=False,  # nothing is generated: a cache would only hold memory
        ).last_hidden_state[0]
        logps = self.lm.get_output_embeddings()(hidden[batch.source], batch.target).flatten()[batch.scored]
        return torch.segment_reduce(logps.double(), "sum", lengths=batch.counts, unsafe=True)

    def forward(
        self, batch: MicroBatch, objective: Objective | None = None, reference: torch.Tensor | None = None
    ) -> Terms | torch.Tensor:
        """Without an objective the sequence sums; with one, its loss summed over the units and its statistics.

        reference: float64 [U, R], the stored reference sum of each unit's responses; None for a loss without.
        """
        sums = self.sequence_sums(batch)
        if objective is None:
            return sums
        units = Sequences(
            sums=sums[batch.units], counts=batch.counts[batch.units], reference=reference, desirable=batch.desirable
        )
        # Without units (an empty micro-batch) the loss is a sum over nothing *of the sums*, so its backward
        # still runs through every layer and no rank misses a collective.
        return objective(units)
