"""Rewards: functions and sequence classifiers that give a response a number."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForSequenceClassification

from prefopt_dist.data.rendering import Template
from prefopt_dist.errors import UserError, shortened
from prefopt_dist.files import checksum
from prefopt_dist.model.folder import ModelFolder, read_config, resolve, weight_files
from prefopt_dist.model.load import load_tokenizer, without_dropout
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import give_back, padded


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


@dataclass(frozen=True)
class Bad:
    """What stands for a number that a reward did not give."""

    why: str


class Reward(Protocol):
    """Scores responses; one whole copy a rank."""

    def score(self, asked: Sequence[tuple[Prompt, str]]) -> list[float | Bad]:
        """A finite number for each prompt and response, in order, or what went wrong."""
        ...

    def close(self) -> None:
        """Gives memory back."""
        ...


class FunctionReward:
    """score(prompt, response, row) → a number.

    prompt: the text or the list of messages; response: its text; row: all fields of the prompt's row, such as the
    right answer. The same arguments must give the same number, or a restart would make other pairs.
    """

    def __init__(self, function: Callable[[Any, str, dict[str, Any]], Any]) -> None:
        self._function = function

    def score(self, asked: Sequence[tuple[Prompt, str]]) -> list[float | Bad]:
        """See Reward."""
        return [self._one(prompt, response) for prompt, response in asked]

    def _one(self, prompt: Prompt, response: str) -> float | Bad:
        try:
            value = self._function(prompt.prompt, response, prompt.row)
        except Exception as e:  # somebody's program: it can raise anything
            return Bad(f"raised {type(e).__name__}: {e}")
        if not isinstance(value, Real):
            return Bad(f"returned {shortened(repr(value))}, which is no number")
        try:
            return finite(float(value))
        except OverflowError:
            return Bad("returned a number beyond every float, which is no finite number")

    def close(self) -> None:
        """See Reward."""


def finite(value: float) -> float | Bad:
    """The value, or what is wrong with it."""
    return value if math.isfinite(value) else Bad(f"returned {value}, which is no finite number")


def find_function(path: str, key: str) -> Callable[[Any, str, dict[str, Any]], Any]:
    """The function that `module:name` names; UserError under the dotted key where there is none."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"{key}: got {path!r}, must be module:name; write it like my_rewards:score")
    here = os.getcwd()
    if here not in sys.path:
        # Jobs of Slurm and images run without it (PYTHONSAFEPATH). Last, so that a clone here does not come before
        # the code that runs.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # somebody's program: its import can raise anything
        raise UserError(
            f"{key}: the module of {path!r} cannot be imported ({type(e).__name__}: {e}); it must lie in the folder "
            "that the job is started in, or on PYTHONPATH"
        ) from e
    if name not in vars(module):
        near = difflib.get_close_matches(name, vars(module), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"define it in {module.__file__}"
        raise UserError(f"{key}: the module {module_name} has no {name!r}; {hint}")
    function = vars(module)[name]
    if not callable(function):
        raise UserError(f"{key}: {path!r} is a {type(function).__name__}, must be a function; name a function")
    found: Callable[[Any, str, dict[str, Any]], Any] = function
    return found


def function_identity(path: str) -> dict[str, str]:
    """What the numbers of a function depend on, as far as can be seen: its name and its module's file."""
    file = importlib.import_module(path.partition(":")[0]).__file__
    return {"function": path, "source": checksum(Path(file)) if file else ""}


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean."""
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
