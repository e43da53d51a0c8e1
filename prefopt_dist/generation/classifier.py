"""A reward model: sequence classification with one output, over prompt and response in its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from prefopt_dist.data.rendering import Template
from prefopt_dist.errors import UserError
from prefopt_dist.generation.prompts import Prompt
from prefopt_dist.generation.rewards import Bad, finite
from prefopt_dist.generation.whole_model import give_back, padded
from prefopt_dist.model.load import ModelFolder, load_tokenizer, read_config, resolve, weight_files, without_dropout


@dataclass(frozen=True)
class RewardFolder:
    """A checked folder of a reward model."""

    model: ModelFolder
    tokenizer: Any
    key: str
    """The dotted key that named it"""


def inspect_reward(name: str, key: str) -> RewardFolder:
    """Checks the folder without loading weights: one output, a chat template."""
    path = resolve(name, key)
    config = read_config(path, key)
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"{key}: {path} is a {', '.join(kinds) or 'model of unknown kind'}, must be a sequence-classification "
            "model; give a reward model"
        )
    if config.num_labels != 1:
        raise UserError(
            f"{key}: {path} has {config.num_labels} outputs (num_labels), must have 1, the reward; give a reward "
            "model, or a function that makes one number of them"
        )
    tokenizer = load_tokenizer(path, key)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{key}: the tokenizer in {path} has no chat template, so a prompt and a response cannot be put to the "
            "model as it was trained; add chat_template.jinja to the folder"
        )
    return RewardFolder(ModelFolder(Path(path), config, weight_files(path, key), key), tokenizer, key)


class ClassifierReward:
    """The model of a folder, whole on one device."""

    def __init__(
        self, folder: RewardFolder, *, template: Template, dtype: torch.dtype, device: torch.device, batch_tokens: int
    ) -> None:
        config = without_dropout(folder.model.config)
        capped = config.to_dict().get("attn_logit_softcapping") is not None  # which sdpa leaves out
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder.model.path,
            config=config,
            dtype=dtype,
            attn_implementation="eager" if capped else None,
            output_loading_info=True,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(
                f"{folder.key}: {folder.model.path} lacks the weights {', '.join(missing[:4])}, which would start at "
                "random; give the folder of a whole reward model"
            )
        self._model = model.eval().to(device)
        self._folder, self._template, self._device = folder, template, device
        # The model finds the last token of each line by the padding token; without one it takes single lines only.
        self._budget = batch_tokens if config.pad_token_id is not None else 1
        self._pad = config.pad_token_id or 0
        self._longest = config.to_dict().get("max_position_embeddings")

    @torch.inference_mode()
    def score(self, asked: Sequence[tuple[Prompt, str]]) -> list[float | Bad]:
        """See Reward. In batches of like length, at most `batch_tokens` padded tokens or one line."""
        found: list[float | Bad] = [Bad("was not asked")] * len(asked)
        lines: list[tuple[int, list[int]]] = []
        for i, (prompt, response) in enumerate(asked):
            ids = self._ids(prompt, response)
            if isinstance(ids, Bad):
                found[i] = ids
            else:
                lines.append((i, ids))
        lines.sort(key=lambda line: -len(line[1]))
        while lines:
            together = max(1, self._budget // len(lines[0][1]))
            batch, lines = lines[:together], lines[together:]
            for (i, _), value in zip(batch, self._batch([ids for _, ids in batch]), strict=True):
                found[i] = finite(value)
        return found

    def _batch(self, lines: Sequence[Sequence[int]]) -> list[float]:
        ids, mask = padded(lines, self._pad, "right", self._device)
        logits = self._model(input_ids=ids, attention_mask=mask).logits
        values: list[float] = logits[:, 0].float().tolist()
        return values

    def _ids(self, prompt: Prompt, response: str) -> list[int] | Bad:
        if isinstance(prompt.prompt, str):
            if self._template.carries(prompt.prompt):
                raise UserError(
                    f"{prompt.origin}: the prompt already carries the chat template of model.tokenizer, which is not "
                    f"that of {self._folder.key}; give prompts as messages or plain text"
                )
            turns = [{"role": "user", "content": prompt.prompt}]
        else:
            turns = list(prompt.prompt)
        turns.append({"role": "assistant", "content": response})
        try:
            text = self._folder.tokenizer.apply_chat_template(turns, tools=prompt.tools or None, tokenize=False)
        except Exception as e:  # a template is somebody's program: it can raise anything
            return Bad(f"cannot be asked, since its chat template refuses the turns ({e})")
        ids: list[int] = self._folder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if self._longest is not None and len(ids) > self._longest:
            return Bad(f"takes at most {self._longest} tokens, but prompt and response have {len(ids)}")
        return ids

    def close(self) -> None:
        """See Reward."""
        del self._model
        give_back(self._device)
