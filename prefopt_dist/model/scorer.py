"""The one module under the engine: a micro-batch in, the loss and what the loss is made of out.

The output head is reached in here because only inside the wrapped module's forward does ZeRO-3 gather
its weight with the right gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from prefopt_dist.batching.micro_batch import MicroBatch, PromptEnds
from prefopt_dist.model.head import attach_logp_head
from prefopt_dist.objectives.objective import Objective, Sequences, Terms


@dataclass(frozen=True)
class DecodingInputs:
    """Sequences that are being sampled: what comes next in each of B lines."""

    ids: torch.Tensor
    """int64 [B, L] the tokens that the cache has not"""
    mask: torch.Tensor
    """int64 [B, all] 1 where a line has a token"""
    positions: torch.Tensor
    """int64 [B, L]"""
    cache: DynamicCache | None


class Scorer(nn.Module):
    """Wraps a causal language model; `lm.` is the only prefix that it adds to parameter names."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        # Gemma's field; the other families have none.
        attach_logp_head(lm.get_output_embeddings(), lm.config.to_dict().get("final_logit_softcapping"))

    def sequence_sums(self, batch: MicroBatch) -> torch.Tensor:
        """float64 [Q]: Σ log π(response token | prompt, response so far) of each sequence."""
        return _sums(self.lm.get_output_embeddings()(self._states(batch), batch.target), batch.scored, batch.counts)

    def forward(
        self,
        batch: MicroBatch | DecodingInputs,
        objective: Objective | None = None,
        reference: torch.Tensor | None = None,
    ) -> Terms | torch.Tensor:
        """Without an objective the sequence sums; with one, its loss summed over the units and its statistics.

        Of sequences that are being sampled the logits [B, V] of what comes next; see `answering`.

        reference: float64 [U, R], the stored reference sum of each unit's responses; None for a loss without.
        """
        if isinstance(batch, DecodingInputs):
            return self._next_logits(batch)
        if objective is None:
            return self.sequence_sums(batch)
        if not torch.is_grad_enabled():
            return objective(_units(batch, self.sequence_sums(batch), reference))

        def loss(first: int, end: int, logps: torch.Tensor) -> torch.Tensor:
            """Of the units of some prompts, from the log-probs of these prompts' states alone."""
            return objective(_units_of(batch, first, end, logps, reference)).loss

        # Without units (an empty micro-batch) the loss is a sum over nothing *of the sums*, so its backward
        # still runs through every layer and no rank misses a collective.
        ends = [prompt.states for prompt in batch.prompts]
        value, logps = self.lm.get_output_embeddings()(self._states(batch), batch.target, ends, loss)
        terms = objective(_units(batch, _sums(logps, batch.scored, batch.counts), reference))
        return terms._replace(loss=value)

    def _next_logits(self, batch: DecodingInputs) -> torch.Tensor:
        logits: torch.Tensor = self.lm(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=batch.cache,
            use_cache=batch.cache is not None,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def _states(self, batch: MicroBatch) -> torch.Tensor:
        """[N, D]: the hidden states that predict response tokens."""
        hidden: torch.Tensor = self.lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            gathered=batch.gathered,
            use_cache=False,  # nothing is generated: a cache would only hold memory
        ).last_hidden_state[0]
        return hidden[batch.source]


def _sums(logps: torch.Tensor, scored: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """float64 [Q] from the [N, K] log-probs."""
    return torch.segment_reduce(logps.flatten()[scored].double(), "sum", lengths=counts, unsafe=True)


def _units(batch: MicroBatch, sums: torch.Tensor, reference: torch.Tensor | None) -> Sequences:
    return Sequences(sums[batch.units], batch.counts[batch.units], reference, batch.desirable)


def _units_of(
    batch: MicroBatch, first: int, end: int, logps: torch.Tensor, reference: torch.Tensor | None
) -> Sequences:
    """The units of the prompts from `first` to before `end`; logps float32 [n, K] of their states."""
    begin, to = batch.prompts[first - 1] if first else PromptEnds(0, 0, 0, 0), batch.prompts[end - 1]
    counts = batch.counts[begin.sequences : to.sequences]
    sums = _sums(logps, batch.scored[begin.scored : to.scored] - begin.states * logps.shape[1], counts)
    mine = batch.by_prompt[begin.units : to.units]
    units = batch.units[mine] - begin.sequences
    return Sequences(sums[units], counts[units], None if reference is None else reference[mine], batch.desirable[mine])
