"""The module that the engine wraps: it takes a micro-batch and returns the loss with its statistics.

The output head is called inside this module, because only inside the wrapped module's forward pass does ZeRO-3
gather the head's weight and form its gradient correctly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from prefopt_dist.batching.micro_batch import ComputePath, MicroBatch, PromptEnds, in_rectangles
from prefopt_dist.distributed.sequence_group import ALONE, SequenceGroup
from prefopt_dist.model import compiled_layers, row_operator
from prefopt_dist.model.expert_loads import ExpertLoads, Tokens
from prefopt_dist.model.final import final_transform
from prefopt_dist.model.head import attach_logp_head
from prefopt_dist.model.parts import backbone, output_head
from prefopt_dist.model.rotary import reset_before_each_use
from prefopt_dist.objectives.objective import Objective, Sequences, Terms


@dataclass(frozen=True)
class DecodingInputs:
    """B sequences that are being sampled, to compute the logits of the next token of each."""

    ids: torch.Tensor
    """int64 [B, L]: the tokens that are not in the cache."""
    mask: torch.Tensor
    """int64 [B, length of the whole sequences]: 1 where a sequence has a token."""
    positions: torch.Tensor
    """int64 [B, L]: positions of `ids` in their sequences."""
    cache: DynamicCache | None


class Scorer(nn.Module):
    """A wrapper of a causal language model; the only prefix that it adds to parameter names is `lm.`."""

    def __init__(
        self,
        lm: PreTrainedModel,
        path: ComputePath = "shared",
        *,
        cut: bool = False,
        loads: ExpertLoads | None = None,
        group: SequenceGroup = ALONE,
    ) -> None:
        """Wrap a model.

        Args:
            lm: the model, loaded for this path (model/load.py).
            path: for which its micro-batches are packed.
            cut: whether the loss's own backward pass ends at the hidden states where there are several rectangles, and
                the caller goes on with `rest`, one rectangle at a time.
            loads: sums over the experts that the tokens take, where there are any to be followed.
            group: the ranks that share each row with this one.
        """
        super().__init__()
        self.lm = lm
        self.path = path
        self.loads = loads
        self.group = group
        self._cut = cut
        self._compiled = compiled_layers.is_compiled(lm)
        self._balance: torch.Tensor | None = None
        self._uncomputed: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        attach_logp_head(output_head(lm), final_transform(lm))
        if path == "alone":
            reset_before_each_use(lm)

    def sequence_sums(self, batch: MicroBatch) -> torch.Tensor:
        """Compute Σ log π(response token | prompt, response so far) of each sequence: float64 [Q]."""
        if batch.part is not None:
            return self._group_sums(batch, squares=False)[0]
        return _sums(self.lm.get_output_embeddings()(self._states(batch), batch.target), batch.scored, batch.counts)

    def forward(
        self,
        batch: MicroBatch | DecodingInputs,
        objective: Objective | None = None,
        reference: torch.Tensor | None = None,
    ) -> Terms | torch.Tensor:
        """Compute an objective's loss, summed over the units, and its statistics.

        With gradients the loss runs inside the output head's forward pass (see model/head.py); where ranks share the
        row it runs after it, since it depends on what the others score, and the backward pass computes the logits
        again. Each of these ranks returns the same terms.

        Args:
            batch: a micro-batch, or sequences that are being sampled.
            objective: the loss; None for the log-probs alone.
            reference: float64 [U, R], the stored reference sum of each unit's responses; None for an objective without
                reference.

        Returns:
            The objective's terms; without an objective the sequence sums, float64 [Q]; for sequences that are being
            sampled the logits of the next token, [B, V].
        """
        if isinstance(batch, DecodingInputs):
            return self._next_logits(batch)
        if objective is None:
            return self.sequence_sums(batch)
        if batch.part is not None:
            return self._group_terms(batch, objective, reference)
        states = self._states(batch)
        squares = states.new_empty(len(states), dtype=torch.float32) if objective.needs_squares else None
        if not torch.is_grad_enabled():
            logps = self.lm.get_output_embeddings()(states, batch.target, squares=squares)
            return objective(_units(batch, logps, reference, squares))

        def loss(first: int, end: int, logps: torch.Tensor, squares: torch.Tensor | None = None) -> torch.Tensor:
            """Compute the loss of the units of some prompts from the log-probs of these prompts' states alone."""
            return objective(_units_of(batch, first, end, logps, reference, squares)).loss

        # In an empty micro-batch the loss is an empty sum *over the sequence sums*: its backward pass still runs
        # through every layer, so this rank takes part in every collective.
        ends = [prompt.states for prompt in batch.prompts]
        value, logps = self.lm.get_output_embeddings()(states, batch.target, ends, loss, squares)
        terms = objective(_units(batch, logps, reference, squares))
        balance, self._balance = self._balance, None
        return terms._replace(loss=value if balance is None else value + balance)

    def _group_terms(self, batch: MicroBatch, objective: Objective, reference: torch.Tensor | None) -> Terms:
        """Compute what `forward` does for a row that the ranks of a group share."""
        sums, relative = self._group_sums(batch, squares=objective.needs_squares)
        units = _units_of_sums(batch, sums.detach(), relative, reference)
        terms = objective(units)
        if not torch.is_grad_enabled():
            return terms
        balance, self._balance = self._balance, None
        assert balance is None, "the balancing loss needs whole rows"
        return terms._replace(loss=objective(replace(units, sums=sums[batch.units])).loss)

    def _group_sums(self, batch: MicroBatch, *, squares: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the sums of the sequences of a row that the ranks of a group share: one reduction over the group.

        Args:
            batch: the micro-batch.
            squares: whether log p − log Σ p² is needed too.

        Returns:
            float64 [Q] log-probs; float64 [Q] the mean of log p − log Σ p² over each sequence, or None.
        """
        part = batch.part
        assert part is not None
        states = self._states(batch)
        of_states = states.new_empty(len(states), dtype=torch.float32) if squares else None
        logps = self.lm.get_output_embeddings()(states, part.target, squares=of_states)
        found = [_sums(logps, part.scored, part.counts)]
        if of_states is not None:
            found.append(_sums(logps.detach() - of_states[:, None], part.scored, part.counts))
        sums, *rest = self.group.sum(torch.stack(found)).unbind()
        return sums, rest[0].detach() / batch.counts if rest else None

    @property
    def is_cut(self) -> bool:
        """Return whether the backward pass of the last loss ends at the hidden states, so that `rest` is needed."""
        return bool(self._uncomputed)

    def rest(self) -> Iterator[torch.Tensor]:
        """Yield a number for each rectangle of the last micro-batch, after the backward pass of its loss.

        The backward pass of the number is that of the rectangle's layers. In one pass over several rectangles autograd
        would keep each parameter's whole gradient until the last one has added its part; under ZeRO-3 a rank has not
        the memory for the whole gradient of all layers.
        """
        while self._uncomputed:
            seeds = [_Seed.apply(x, leaf.grad) for x, leaf in self._uncomputed.pop()]  # type: ignore[no-untyped-call]
            yield sum(seeds[1:], seeds[0])
            del seeds

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
        """Compute the hidden states that predict response tokens, [N, D], and the balancing loss beside them.

        Where ranks share the row they are those of this rank's part, [n, D].
        """
        tokens = self.loads.tokens(batch) if self.loads is not None and torch.is_grad_enabled() else None
        if in_rectangles(self.path):
            # A dummy rectangle is among the flattened ones too. Nothing indexes it, and its gradient is 0, but its
            # backward pass runs, so that this rank takes part in every collective.
            passes = [self._pass(batch, tokens, i) for i in range(len(batch.rectangles))]
            if self._cut and len(passes) > 1 and torch.is_grad_enabled():
                found = [[x for x in results if x is not None] for results in passes]
                self._uncomputed = [[(x, x.detach().requires_grad_()) for x in results] for results in found]
                leaves = [[leaf for _, leaf in pairs] for pairs in self._uncomputed]
                passes = [(of[0], of[1] if len(of) > 1 else None) for of in leaves]
            balances = [balance for _, balance in passes if balance is not None]
            self._balance = torch.stack(balances).sum() if balances else None
            return torch.cat([hidden for hidden, _ in passes])[batch.source]
        hidden, self._balance = self._pass(batch, tokens, None)
        return hidden[batch.source if batch.part is None else batch.part.source]

    def _pass(
        self, batch: MicroBatch, tokens: Tokens | None, rectangle: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the hidden states of the row, of this rank's part of it, or of a rectangle: [T, D] or [B·L, D].

        Args:
            batch: the micro-batch.
            tokens: what the row's tokens count for; None where experts are not followed.
            rectangle: number of the rectangle; None for the row.

        Returns:
            The states, and the pass's part of the balancing loss, or None.
        """

        def compute() -> torch.Tensor:
            hidden: torch.Tensor
            if rectangle is not None:
                # No mask is needed, since a causal model does not see padding on the right.
                ids = batch.input_ids[0, batch.rectangles[rectangle]]
                hidden = backbone(self.lm)(input_ids=ids, use_cache=False).last_hidden_state
            else:
                compiled = self._compiled and batch.part is None and compiled_layers.takes(batch.tokens)
                shared, own = {}, slice(None)
                if batch.part is not None:
                    shared, own = {"sequence_group": self.group}, slice(batch.part.start, batch.part.end)
                hidden = backbone(self.lm)(
                    input_ids=batch.input_ids[:, own],
                    position_ids=batch.position_ids[:, own],
                    segments=row_operator.number_of(batch) if compiled else batch.segments,
                    gathered=None if compiled else batch.gathered,
                    use_cache=False,  # nothing is generated, so a cache would only take memory
                    **shared,
                ).last_hidden_state
            return hidden.flatten(0, 1)

        if self.loads is None or tokens is None:
            return compute(), None
        if batch.part is not None:
            tokens = tokens._replace(uses=tokens.uses[batch.part.start : batch.part.end])
        return self.loads.through(self.lm, batch, tokens, rectangle, compute)


class _Seed(torch.autograd.Function):
    """The number 0, whose gradient by the hidden states is the given one, times the gradient of the number."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def _sums(logps: torch.Tensor, scored: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sum the scored log-probs of each sequence.

    Args:
        logps: float32 [N, K].
        scored: int64 [S], places of the scored tokens in the flattened `logps`.
        counts: int64 [Q], scored tokens of each sequence.

    Returns:
        float64 [Q].
    """
    return torch.segment_reduce(logps.flatten()[scored].double(), "sum", lengths=counts, unsafe=True)


def _relative(
    logps: torch.Tensor, squares: torch.Tensor | None, scored: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor | None:
    """Return the mean of log p − log Σ p² over each sequence's scored tokens, float64 [Q]; None without squares."""
    if squares is None:
        return None
    return _sums(logps.detach() - squares[:, None], scored, counts) / counts


def _units(
    batch: MicroBatch, logps: torch.Tensor, reference: torch.Tensor | None, squares: torch.Tensor | None
) -> Sequences:
    """Return all units, from the log-probs [N, K] and log Σ p² [N] of all states."""
    sums = _sums(logps, batch.scored, batch.counts)
    return _units_of_sums(batch, sums, _relative(logps, squares, batch.scored, batch.counts), reference)


def _units_of_sums(
    batch: MicroBatch, sums: torch.Tensor, relative: torch.Tensor | None, reference: torch.Tensor | None
) -> Sequences:
    """Return all units, from the sequences' sums [Q] and their means of log p − log Σ p², [Q] or None."""
    numbers = batch.desirable, batch.weight, batch.margin, batch.partner
    return Sequences(
        sums[batch.units],
        batch.counts[batch.units],
        reference,
        *numbers,
        None if relative is None else relative[batch.units],
        batch.ranks,
    )


def _units_of(
    batch: MicroBatch,
    first: int,
    end: int,
    logps: torch.Tensor,
    reference: torch.Tensor | None,
    squares: torch.Tensor | None,
) -> Sequences:
    """Return the units of the prompts from `first` to before `end`.

    Args:
        batch: the micro-batch.
        first: index of the first prompt.
        end: index after the last prompt.
        logps: float32 [n, K], the log-probs of these prompts' states.
        reference: float64 [U, R], or None.
        squares: float32 [n], log Σ p² of these states, or None.
    """
    begin, stop = batch.prompts[first - 1] if first else PromptEnds(0, 0, 0, 0), batch.prompts[end - 1]
    counts = batch.counts[begin.sequences : stop.sequences]
    scored = batch.scored[begin.scored : stop.scored] - begin.states * logps.shape[1]
    sums = _sums(logps, scored, counts)
    relative = _relative(logps, squares, scored, counts)
    indices = batch.by_prompt[begin.units : stop.units]
    units = batch.units[indices] - begin.sequences

    def of(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[indices]

    numbers = batch.desirable[indices], of(batch.weight), of(batch.margin), of(batch.partner)
    return Sequences(
        sums[units],
        counts[units],
        of(reference),
        *numbers,
        None if relative is None else relative[units],
        of(batch.ranks),
    )
