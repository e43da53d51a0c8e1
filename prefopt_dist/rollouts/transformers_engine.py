"""Sampling with the model's own code in transformers: batched, left-padded, with a key-value cache.

Legend: P distinct prompts of a batch, B rows (responses) of it, L longest prompt, V vocabulary.

The packed attention of training is not used here: a row grows by one token at a time, and responses to the same prompt
get copies of its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from prefopt_dist.distributed.zero3 import copy_to_unsharded
from prefopt_dist.errors import UserError
from prefopt_dist.model.adapter import Adapter, attach
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.model.load import load_language_model, load_with_adapter, own_attention, without_dropout
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Ids, Sampling, choose_tokens, free_memory, pad_lines, uniforms

Row = tuple[int, int]
"""Index of a prompt and number of a response to it."""


def load_for_sampling(folder: ModelFolder, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the model of a folder, unsharded, on the device, with transformers' own attention."""
    config = without_dropout(folder.config)
    model = load_with_adapter(folder, config, dtype, attn_implementation=own_attention(config))
    loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def copy_for_sampling(
    sharded: PreTrainedModel, folder: ModelFolder, adapter: Adapter | None, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Copy the live policy, unsharded and with its adapters, to each rank's device (all ranks call it).

    The state of the random generators does not change.

    Args:
        sharded: the language model under ZeRO-3.
        folder: the folder that it was loaded from.
        adapter: the adapters that are trained; None without.
        dtype: of the copy.
        device: of the copy.
    """
    config = without_dropout(folder.config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        attention = own_attention(config)
        copy: PreTrainedModel
        if folder.quantised:  # with the scales of its layers, which are not parameters
            copy = load_language_model(folder, config, dtype, attn_implementation=attention).to(device)
        else:
            copy = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if adapter is not None:
            attach(copy, adapter)
    copy_to_unsharded(sharded, copy)
    return copy.eval()


class TransformersEngine:
    """Sampling with an unsharded model on one device."""

    lockstep = False

    def __init__(self, model: PreTrainedModel, name: str, *, batch_tokens: int, nan_ends: bool = False) -> None:
        """Take a model that is in evaluation mode.

        Args:
            model: the language model.
            name: of the model, for messages.
            batch_tokens: see `batches`.
            nan_ends: where logits are NaN, as of a model that has diverged, end the answer instead of raising.
        """
        self._nan_ends = nan_ends
        self._model = model
        self._name = name
        self._device = next(model.parameters()).device
        self._batch_tokens = batch_tokens

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Ids]]:
        """Sample as in `Engine`; prompts of similar lengths are the most efficient.

        Raises:
            UserError: logits are NaN and nan_ends is False.
        """
        responses: list[list[Ids]] = [[[] for _ in range(sampling.n)] for _ in prompts]
        with torch.no_grad():
            for rows in batches([len(p.ids) for p in prompts], sampling, self._batch_tokens):
                for (i, k), ids in zip(rows, self._batch(prompts, rows, sampling), strict=True):
                    responses[i][k] = ids
        return responses

    def meet(self) -> None:
        """Do nothing: each rank samples by itself."""

    @torch.no_grad()
    def logits_before(self, prompt: Ids, response: Ids) -> torch.Tensor:
        """Return the logits from which each token of a response is drawn: float32 [tokens, V], on the CPU.

        The sequence is computed by itself, without a cache and without padding.
        """
        ids = torch.tensor([[*prompt, *response[:-1]]], device=self._device)
        logits: torch.Tensor = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(response)).logits
        return logits[0].float().cpu()

    def _batch(self, prompts: Sequence[Prompt], rows: Sequence[Row], sampling: Sampling) -> list[Ids]:
        """Return the responses of one batch; rows that have ended are removed from it during sampling."""
        noise = np.stack(
            [uniforms(sampling.seed, prompts[i].key, k, sampling.max_new_tokens) for i, k in rows]
        )  # [B, max_new_tokens]
        u = torch.from_numpy(noise).to(self._device)
        responses: list[Ids] = [[] for _ in rows]
        cache, mask, logits = self._prefill(prompts, rows)
        position = mask.sum(-1)  # of the next token
        row_of_line = list(range(len(rows)))  # the tensors have a line for each row that is left in the batch
        open_rows = set(row_of_line)
        for t in range(sampling.max_new_tokens):
            chosen = choose_tokens(logits, u[row_of_line, t], sampling.temperature, sampling.top_p)
            for row, token in zip(row_of_line, chosen.tolist(), strict=True):
                if row in open_rows:
                    if token == logits.shape[-1]:
                        if not self._nan_ends:
                            raise self._nan_error(prompts[rows[row][0]])
                        token = sampling.stop_ids[0]
                    responses[row].append(token)
                    if token in sampling.stop_ids:
                        open_rows.discard(row)
            if not open_rows or t + 1 == sampling.max_new_tokens:
                break
            # Ended rows are removed when they are half of the batch, so that the copies cost less than they save.
            if 2 * len(open_rows) <= len(row_of_line):
                open_lines = [line for line, row in enumerate(row_of_line) if row in open_rows]
                kept = torch.tensor(open_lines, device=self._device)
                cache.reorder_cache(kept)
                chosen, mask, position = chosen[kept], mask[kept], position[kept]
                row_of_line = [row_of_line[line] for line in open_lines]
            mask = torch.cat([mask, mask.new_ones(len(row_of_line), 1)], -1)
            logits = self._forward(chosen[:, None], mask, position[:, None], cache)
            position = position + 1
        return responses

    def _nan_error(self, prompt: Prompt) -> UserError:
        return UserError(
            f"{self._name}: the model's logits for the prompt at {prompt.origin} are NaN or infinite, so no token can "
            "be sampled; use a model with finite weights, set model.dtype=float32, or raise a temperature that is "
            "close to 0"
        )

    def _prefill(
        self, prompts: Sequence[Prompt], rows: Sequence[Row]
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Run each distinct prompt through the model once; return cache, mask [B, L] and last logits [B, V] by row."""
        distinct = list(dict.fromkeys(i for i, _ in rows))
        ids, mask = pad_lines([prompts[i].ids for i in distinct], 0, "left", self._device)
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        line_of = {i: line for line, i in enumerate(distinct)}
        copies = torch.tensor([line_of[i] for i, _ in rows], device=self._device)
        cache.reorder_cache(copies)
        return cache, mask[copies], logits[copies]

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Return the logits after each line's last token, [lines, V]."""
        logits: torch.Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def close(self) -> None:
        """Release the model's memory."""
        del self._model
        free_memory(self._device)


def batches(lengths: Sequence[int], sampling: Sampling, batch_tokens: int) -> Iterator[list[Row]]:
    """Yield batches of rows for which rows × (longest prompt + max_new_tokens) is within the budget, or one row alone.

    Args:
        lengths: tokens of each prompt, in an order in which neighbours are similar.
        sampling: its n and max_new_tokens.
        batch_tokens: the budget, in tokens.
    """
    rows: list[Row] = []
    longest = 0
    for i, length in enumerate(lengths):
        for k in range(sampling.n):
            grown = max(longest, length)
            if rows and (len(rows) + 1) * (grown + sampling.max_new_tokens) > batch_tokens:
                yield rows
                rows, grown = [], length
            rows.append((i, k))
            longest = grown
    yield rows
