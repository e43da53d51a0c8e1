"""Sampling with the model's own code in transformers: batched, left-padded, with a cache of keys and values.

Legend: P distinct prompts of a batch, B rows (responses) of it, L longest prompt, V vocabulary.

The packed attention of training is not used here: a row grows by a token at a time, and sequences that share
a prompt get copies of its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from prefopt_dist.distributed.zero3 import copy_to_unsharded
from prefopt_dist.errors import UserError
from prefopt_dist.model.adapter import Adapter, attach
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.model.load import without_dropout
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Ids, Sampling, choose_tokens, free_memory, pad_lines, uniforms

Row = tuple[int, int]
"""Index of the prompt, number of the response."""


def load_for_sampling(folder: ModelFolder, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the model of a folder, whole on the device, with transformers' own attention."""
    config = without_dropout(folder.config)
    model = AutoModelForCausalLM.from_pretrained(
        folder.path, config=config, dtype=dtype, attn_implementation=attention_of(config)
    )
    whole: PreTrainedModel = model.eval().to(device)
    return whole


def copy_for_sampling(
    sharded: PreTrainedModel, folder: ModelFolder, adapter: Adapter | None, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """All ranks: return a whole copy of the live policy on each rank's device, adapters on; no random state changes.

    sharded: the language model under ZeRO-3; folder: that it was loaded from.
    """
    config = without_dropout(folder.config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        whole: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_of(config)
        )
        if adapter is not None:
            attach(whole, adapter)
    copy_to_unsharded(sharded, whole)
    return whole.eval()


def attention_of(config: PreTrainedConfig) -> str:
    """Return the name of the attention that computes the model's own numbers while it answers."""
    # transformers' sdpa leaves out the cap of Gemma 2's attention.
    return "eager" if config.to_dict().get("attn_logit_softcapping") is not None else "sdpa"


class TransformersEngine:
    """A whole model on one device answers."""

    lockstep = False

    def __init__(self, model: PreTrainedModel, name: str, *, batch_tokens: int, nan_ends: bool = False) -> None:
        """name: of the model, for messages; batch_tokens: see `batches`.

        nan_ends: where the logits are NaN an answer ends, instead of the job: of a model that training has wrecked.
        """
        self._nan_ends = nan_ends
        self._model = model
        self._name = name
        self._device = next(model.parameters()).device
        self._batch_tokens = batch_tokens

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Ids]]:
        """See Engine. The prompts are best of like length."""
        responses: list[list[Ids]] = [[[] for _ in range(sampling.n)] for _ in prompts]
        with torch.no_grad():
            for rows in batches([len(p.ids) for p in prompts], sampling, self._batch_tokens):
                for (i, k), ids in zip(rows, self._batch(prompts, rows, sampling), strict=True):
                    responses[i][k] = ids
        return responses

    def meet(self) -> None:
        """See Engine: nobody waits for a whole copy."""

    def _batch(self, prompts: Sequence[Prompt], rows: Sequence[Row], sampling: Sampling) -> list[Ids]:
        """The responses of one batch, whose rows leave it as they end."""
        noise = np.stack(
            [uniforms(sampling.seed, prompts[i].key, k, sampling.max_new_tokens) for i, k in rows]
        )  # [B, max_new_tokens]
        u = torch.from_numpy(noise).to(self._device)
        responses: list[Ids] = [[] for _ in rows]
        cache, mask, logits = self._read(prompts, rows)
        position = mask.sum(-1)  # of the token that comes next
        here = list(range(len(rows)))  # row of each line of the tensors
        open_rows = set(here)
        for t in range(sampling.max_new_tokens):
            chosen = choose_tokens(logits, u[here, t], sampling.temperature, sampling.top_p)
            for row, token in zip(here, chosen.tolist(), strict=True):
                if row in open_rows:
                    if token == logits.shape[-1]:
                        if not self._nan_ends:
                            raise self._no_numbers(prompts[rows[row][0]])
                        token = sampling.stop_ids[0]
                    responses[row].append(token)
                    if token in sampling.stop_ids:
                        open_rows.discard(row)
            if not open_rows or t + 1 == sampling.max_new_tokens:
                break
            if 2 * len(open_rows) <= len(here):  # each time half of them: the copies cost no more than they save
                stay = [line for line, row in enumerate(here) if row in open_rows]
                kept = torch.tensor(stay, device=self._device)
                cache.batch_select_indices(kept)
                chosen, mask, position = chosen[kept], mask[kept], position[kept]
                here = [here[line] for line in stay]
            mask = torch.cat([mask, mask.new_ones(len(here), 1)], -1)
            logits = self._forward(chosen[:, None], mask, position[:, None], cache)
            position = position + 1
        return responses

    def _no_numbers(self, prompt: Prompt) -> UserError:
        return UserError(
            f"{self._name}: the model's logits for the prompt at {prompt.origin} are NaN or infinite, so no token can "
            "be sampled; mend the weights, or set model.dtype=float32 or a temperature that is not next to 0"
        )

    def _read(self, prompts: Sequence[Prompt], rows: Sequence[Row]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Each distinct prompt once through the model; then cache, mask [B, L] and last logits [B, V] by row."""
        distinct = list(dict.fromkeys(i for i, _ in rows))
        ids, mask = pad_lines([prompts[i].ids for i in distinct], 0, "left", self._device)
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        line_of = {i: line for line, i in enumerate(distinct)}
        copies = torch.tensor([line_of[i] for i, _ in rows], device=self._device)
        cache.batch_select_indices(copies)
        return cache, mask[copies], logits[copies]

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """[lines, V]: the logits after each line's last token."""
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
        """See Engine."""
        del self._model
        free_memory(self._device)


def batches(lengths: Sequence[int], sampling: Sampling, batch_tokens: int) -> Iterator[list[Row]]:
    """Rows that fit together: lines × (longest prompt + new tokens) within the budget, or one line alone.

    lengths: of the prompts, in an order in which neighbours are alike.
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
