"""Rewards: functions and reward models (sequence classifiers) that score a response with a number."""

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

from prefopt_dist.data.template import Template
from prefopt_dist.errors import UserError, shorten
from prefopt_dist.files import checksum
from prefopt_dist.model.folder import ModelFolder, read_config, resolve
from prefopt_dist.model.load import has_soft_cap, load_tokenizer, without_dropout
from prefopt_dist.model.weight_files import weight_files
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import free_memory, pad_lines


@dataclass(frozen=True)
class RewardFolder:
    """The folder of a reward model, checked."""

    path: Path
    model: ModelFolder | None
    """None where the folder has a tokenizer alone, which is enough for a server's reward model"""
    tokenizer: Any
    key: str
    """Dotted key that names it in the configuration"""


def inspect_reward(name: str, key: str, *, served: bool = False) -> RewardFolder:
    """Check a reward model's folder without loading weights.

    Args:
        name: a folder or a hub name.
        key: its dotted key, for messages.
        served: whether a server computes the rewards, so that the folder may have no weights.

    Raises:
        UserError: it is not a sequence classifier with one output, or its tokenizer has no chat template.
    """
    path = Path(resolve(name, key))
    if served and not any(path.glob("*.safetensors")):
        return RewardFolder(path, None, _tokenizer(path, key), key)
    config = read_config(path, key)
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"{key}: {path} is a {', '.join(kinds) or 'model of unknown kind'}, must be a sequence classifier "
            "(…ForSequenceClassification); give a reward model"
        )
    if config.num_labels != 1:
        raise UserError(
            f"{key}: {path} has {config.num_labels} outputs (num_labels), must have 1, the reward; give a reward "
            "model with one output, or a function that combines the outputs into one number"
        )
    return RewardFolder(path, ModelFolder(path, config, weight_files(path, key), key), _tokenizer(path, key), key)


def _tokenizer(path: Path, key: str) -> Any:
    """Load a reward model's tokenizer; raise UserError where it has no chat template."""
    tokenizer = load_tokenizer(path, key)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{key}: the tokenizer in {path} has no chat template, so a prompt and a response cannot be given to the "
            "model in the form it was trained on; add chat_template.jinja to the folder"
        )
    return tokenizer


def scored_ids(folder: RewardFolder, template: Template, prompt: Prompt, response: str) -> list[int] | RewardFailure:
    """Return the tokens of a prompt and a response in the chat template of a reward model.

    Args:
        folder: of the reward model.
        template: of the trained model, in which a prompt must not be rendered already.
        prompt: the prompt.
        response: to be scored.

    Raises:
        UserError: the prompt is rendered already.
    """
    if isinstance(prompt.prompt, str):
        if template.is_templated(prompt.prompt):
            raise UserError(
                f"{prompt.origin}: the prompt is already rendered with the chat template of model.tokenizer, but "
                f"the reward model {folder.key} has its own template; give prompts as messages or plain text"
            )
        turns = [{"role": "user", "content": prompt.prompt}]
    else:
        turns = list(prompt.prompt)
    turns.append({"role": "assistant", "content": response})
    try:
        text = folder.tokenizer.apply_chat_template(turns, tools=prompt.tools or None, tokenize=False)
    except Exception as e:  # a template is a user's program: it can raise anything
        return RewardFailure(f"cannot be computed, since the reward model's chat template refuses the turns ({e})")
    ids: list[int] = folder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    longest = None if folder.model is None else folder.model.config.to_dict().get("max_position_embeddings")
    if longest is not None and len(ids) > longest:
        return RewardFailure(f"takes at most {longest} tokens, but prompt and response have {len(ids)}")
    return ids


class ClassifierReward:
    """A reward that is a sequence classifier, unsharded on one device."""

    def __init__(
        self, folder: RewardFolder, *, template: Template, dtype: torch.dtype, device: torch.device, batch_tokens: int
    ) -> None:
        assert folder.model is not None
        config = without_dropout(folder.model.config)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder.path,
            config=config,
            dtype=dtype,
            attn_implementation="eager" if has_soft_cap(config) else None,
            output_loading_info=True,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(
                f"{folder.key}: {folder.path} lacks the weights {', '.join(missing[:4])}, which would be random; "
                "give the folder of a complete reward model"
            )
        self._model = model.eval().to(device)
        self._folder, self._template, self._device = folder, template, device
        # The model finds the last token of each row by the padding token; without one it takes single rows only.
        self._budget = batch_tokens if config.pad_token_id is not None else 1
        self._pad = config.pad_token_id or 0

    @torch.inference_mode()
    def score(self, responses: Sequence[tuple[Prompt, str]]) -> list[float | RewardFailure]:
        """Score responses as in `Reward`, in batches of similar length with at most `batch_tokens` padded tokens.

        A response that exceeds `batch_tokens` is a batch by itself.
        """
        found: list[float | RewardFailure] = [RewardFailure("was not computed")] * len(responses)
        lines: list[tuple[int, list[int]]] = []
        for i, (prompt, response) in enumerate(responses):
            ids = scored_ids(self._folder, self._template, prompt, response)
            if isinstance(ids, RewardFailure):
                found[i] = ids
            else:
                lines.append((i, ids))
        lines.sort(key=lambda line: -len(line[1]))
        while lines:
            together = max(1, self._budget // len(lines[0][1]))
            batch, lines = lines[:together], lines[together:]
            for (i, _), value in zip(batch, self._batch([ids for _, ids in batch]), strict=True):
                found[i] = finite_or_failure(value)
        return found

    def _batch(self, lines: Sequence[Sequence[int]]) -> list[float]:
        ids, mask = pad_lines(lines, self._pad, "right", self._device)
        logits = self._model(input_ids=ids, attention_mask=mask).logits
        values: list[float] = logits[:, 0].float().tolist()
        return values

    def close(self) -> None:
        """Release the model's memory."""
        del self._model
        free_memory(self._device)


@dataclass(frozen=True)
class RewardFailure:
    """The reason why a reward gave no number."""

    reason: str
    """A predicate of which the reward is the subject, such as `returned nan, …`"""


class Reward(Protocol):
    """A reward that scores responses; each rank holds an unsharded copy."""

    def score(self, responses: Sequence[tuple[Prompt, str]]) -> list[float | RewardFailure]:
        """Return for each prompt and response, in order, a finite number or the failure."""
        ...

    def close(self) -> None:
        """Release the memory that the reward holds."""
        ...


class FunctionReward:
    """A reward that is a user's function, score(prompt, response, row) → a number.

    prompt is the text or the list of messages, response its text, and row all fields of the prompt's row, such as the
    right answer. The same arguments must give the same number: otherwise a restart would make other pairs.
    """

    def __init__(self, function: Callable[[Any, str, dict[str, Any]], Any]) -> None:
        self._function = function

    def score(self, responses: Sequence[tuple[Prompt, str]]) -> list[float | RewardFailure]:
        """Score responses one by one, as in `Reward`."""
        return [self._score(prompt, response) for prompt, response in responses]

    def _score(self, prompt: Prompt, response: str) -> float | RewardFailure:
        try:
            value = self._function(prompt.prompt, response, prompt.row)
        except Exception as e:  # a user's program: it can raise anything
            return RewardFailure(f"raised {type(e).__name__}: {e}")
        if not isinstance(value, Real):
            return RewardFailure(f"returned {shorten(repr(value))}, which is not a number")
        try:
            return finite_or_failure(float(value))
        except OverflowError:
            return RewardFailure("returned a number that is too large for a float, so it is not finite")

    def close(self) -> None:
        """Do nothing: a function holds no memory."""


def finite_or_failure(value: float) -> float | RewardFailure:
    """Return the value, or a failure if it is NaN or infinite."""
    return value if math.isfinite(value) else RewardFailure(f"returned {value}, which is not finite")


def find_function(path: str, key: str) -> Callable[[Any, str, dict[str, Any]], Any]:
    """Import and return the function that `path` names as `module:name`.

    Raises:
        UserError: the module cannot be imported, or has no such function; the message begins with the dotted key.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"{key}: got {path!r}, must be module:name; write it like my_rewards:score")
    here = os.getcwd()
    if here not in sys.path:
        # Slurm jobs and images run with PYTHONSAFEPATH, which omits the working folder. It is appended as the last
        # entry, so that a clone of this package there does not shadow the running code.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # a user's program: its import can raise anything
        raise UserError(
            f"{key}: the module of {path!r} cannot be imported ({type(e).__name__}: {e}); it must be in the folder "
            "in which the job is started, or on PYTHONPATH"
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
    """Return what a reward function's values depend on, as far as it is known: its path and its file's checksum."""
    file = importlib.import_module(path.partition(":")[0]).__file__
    return {"function": path, "source": checksum(Path(file)) if file else ""}


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return Σ weight · value / Σ weight."""
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
