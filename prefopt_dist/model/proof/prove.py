"""The proof that a path computes a model's own log-probs and gradients, and the choice of a path by it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from prefopt_dist.batching.micro_batch import PATHS, ComputePath, pack
from prefopt_dist.errors import UserError
from prefopt_dist.model import attention
from prefopt_dist.model.load import own_attention, without_dropout
from prefopt_dist.model.proof import alone, sequences
from prefopt_dist.model.proof.alone import Gradients
from prefopt_dist.model.proof.cut import MOST_BYTES, CannotCut, Cut, cut
from prefopt_dist.model.proof.weights import randomise
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives.objective import Sequences, Terms, terms

SUM_TOLERANCE = 1e-6
"""Largest relative difference of a log-prob sum."""
GRADIENT_TOLERANCE = 1e-5
"""Largest ‖Δ‖/‖g‖ of the gradient of a tensor."""
MOST_NOISE = 10.0
"""Tolerances are at most this many times as large where float32 itself is as far from float64."""
NOISE_FACTOR = 3.0
"""Two float32 computations differ by at most this many times the difference of one from float64."""
VANISHING = 1e-7
"""A difference of a tensor's gradient below this share of the whole gradient is rounding: some gradients are 0 but for
it, such as that of a bias of keys, which shifts all scores of a query alike."""
CAUSAL_TOLERANCE = 1e-5
"""Largest change of an earlier logit by a later token, relative to the largest logit."""


@dataclass(frozen=True)
class Tried:
    """What came of one path."""

    path: ComputePath
    equal: bool
    sums: float | None = None
    """Largest relative difference of a log-prob sum; None where the path ended with an error."""
    gradients: float | None = None
    """Largest ‖Δ‖/‖g‖ of a tensor."""
    tensor: str = ""
    """The tensor of that difference."""
    why: str = ""
    """Why it is not equal, or which noise explains a difference above the tolerances."""

    def text(self) -> str:
        """Name the numbers or the error."""
        if self.sums is None:
            return f"{self.path}: {self.why}"
        numbers = f"log-probs differ by {self.sums:.1e}, gradients by {self.gradients:.1e} ({self.tensor})"
        return f"{self.path}: {numbers}" + (f"; {self.why}" if self.why else "")


@dataclass(frozen=True)
class Proof:
    """The path of a model, with what was tried to find it."""

    path: ComputePath
    tried: tuple[Tried, ...]
    cuts: tuple[str, ...]
    influence: float
    """By how much a later token changes an earlier logit, relative to the largest."""
    seconds: float


class _Weighted:
    """The loss Σ weight · log-prob, whose weights come in the place of the reference's log-probs."""

    responses = 2
    needs_reference = True
    needs_reference_point = False
    metrics = ("loss",)
    counted_by: Mapping[str, str] = {}
    start_loss = None

    def __call__(self, units: Sequences) -> Terms:
        assert units.reference is not None
        return terms(units, (units.sums * units.reference).sum(1), [])

    def at_reference_point(self, z0: torch.Tensor) -> _Weighted:
        raise AssertionError

    def paired(self, per_unit: torch.Tensor) -> torch.Tensor:
        raise AssertionError


WEIGHTED = _Weighted()


def prove(
    config: PreTrainedConfig,
    *,
    key: str,
    path: ComputePath | None = None,
    max_length: int | None = None,
    device: torch.device | None = None,
    most_bytes: int = MOST_BYTES,
) -> Proof:
    """Return the most efficient path whose numbers are the model's own, on a cut of the model with random weights.

    Args:
        config: the model's configuration.
        key: the dotted key that names the model, for messages.
        path: the only path to try; None: all, in the order of `PATHS`.
        max_length: tokens of the run's longest sequence; None where unknown.
        device: where to compute; None: the CPU.
        most_bytes: largest size of the float32 weights of the cut.

    Raises:
        UserError: no path computes the model's own numbers, or the model is not causal, or no cut of it can be built.
    """
    begin = time.perf_counter()
    device = device or torch.device("cpu")
    try:
        small = cut(without_dropout(config), max_length, most_bytes)
        case = _Case(small, device)
    except CannotCut as e:
        raise UserError(
            f"{key}: no small copy of this {config.model_type} model can be built, so that no path can be proven "
            f"({e}). Give a model of another family."
        ) from e
    if case.influence > CAUSAL_TOLERANCE:
        raise UserError(
            f"{key}: this {config.model_type} model is not causal: a later token changes an earlier logit by "
            f"{case.influence:.1e} of the largest, so that the log-prob of a token would depend on those after it. Give a "
            "causal language model."
        )
    tried: list[Tried] = []
    for candidate in PATHS if path is None else (path,):
        tried.append(case.attempt(candidate))
        if tried[-1].equal:
            return Proof(candidate, tuple(tried), small.changes, case.influence, time.perf_counter() - begin)
    raise UserError(
        f"{key}: no path computes the numbers of this {config.model_type} model alone. "
        + "; ".join(t.text() for t in tried)
        + f". Allowed are {SUM_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e}. "
        + ("Give a model of another family." if path is None else "Set model.path=auto.")
    )


class _Case:
    """A cut with weights, and what plain transformers computes with them."""

    def __init__(self, small: Cut, device: torch.device) -> None:
        self._config, self._device = small.config, device
        model = _build(small.config, "eager").to(device)
        randomise(model)
        self._state = {name: x.detach() for name, x in model.state_dict().items()}
        self._units = sequences.units(small.config.vocab_size, _special(small.config.to_dict()))
        self._by = sequences.weights().to(device)
        ids = torch.from_numpy(np.concatenate([self._units[-1].prompt, self._units[-1].responses[1]]).astype(np.int64))
        self.influence = alone.influence_of_later_tokens(model, ids.to(device))
        self._sums, self._gradients = alone.sums_and_gradients(model, self._units, self._by)
        self._whole = _norm(list(self._gradients.values()))
        self._noise: _Noise | None = None

    def attempt(self, path: ComputePath) -> Tried:
        """Compute the same by a path, and compare."""
        try:
            sums, gradients = self._by_path(path)
        except Exception as e:  # whatever the family's code or ours raises on this path ends it
            return Tried(path, False, why=f"{type(e).__name__}: {_first_line(e)}")
        return self._compare(path, sums, gradients)

    def _by_path(self, path: ComputePath) -> tuple[torch.Tensor, Gradients]:
        model = self._filled(own_attention(self._config) if path == "plain" else attention.NAME)
        scorer = Scorer(model, path).train()
        batch = pack(self._units, self._by.shape[1], path).to(self._device)
        found = scorer(batch, WEIGHTED, self._by)
        found.loss.backward()
        # The head's class was exchanged in this model alone.
        return found.sums, {name.removeprefix("lm."): g for name, g in alone.take_gradients(scorer).items()}

    def _filled(self, attention: str) -> Any:
        """Build the model again with the same weights, whose memory it shares."""
        with no_init_weights():
            model = _build(self._config, attention)
        model.to(self._device).load_state_dict(self._state, assign=True)
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
        model.tie_weights()
        return model

    def _compare(self, path: ComputePath, sums: torch.Tensor, gradients: Gradients) -> Tried:
        sums_off = float(((sums - self._sums).abs() / self._sums.abs()).max())
        off, tensor = _worst(self._gradients, gradients, self._whole)
        if not (math.isfinite(sums_off) and math.isfinite(off)):
            return Tried(path, False, sums_off, off, tensor, "not finite")
        if sums_off <= SUM_TOLERANCE and off <= GRADIENT_TOLERANCE:
            return Tried(path, True, sums_off, off, tensor)
        if sums_off > MOST_NOISE * SUM_TOLERANCE or off > MOST_NOISE * GRADIENT_TOLERANCE:
            return Tried(path, False, sums_off, off, tensor)
        noise = self._measured_noise()
        why = f"plain float32 itself differs from float64 by {noise.sums:.1e} and {noise.gradients:.1e}"
        equal = sums_off <= max(SUM_TOLERANCE, NOISE_FACTOR * noise.sums) and off <= max(
            GRADIENT_TOLERANCE, NOISE_FACTOR * noise.gradients
        )
        return Tried(path, equal, sums_off, off, tensor, why)

    def _measured_noise(self) -> _Noise:
        if self._noise is None:
            model = self._filled("eager").double()
            sums, gradients = alone.sums_and_gradients(model, self._units, self._by)
            off, _ = _worst(gradients, self._gradients, self._whole)
            self._noise = _Noise(float(((sums - self._sums).abs() / sums.abs()).max()), off)
        return self._noise


@dataclass(frozen=True)
class _Noise:
    """How far plain float32 is from float64."""

    sums: float
    gradients: float


def _build(config: PreTrainedConfig, attention: str) -> Any:
    model: Any = AutoModelForCausalLM.from_config(
        type(config).from_dict(config.to_dict()), dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def _special(fields: dict[str, Any]) -> list[int]:
    """Return the ids of special tokens."""
    found = [v for name, v in fields.items() if name.endswith(("token_id", "token_index"))]
    return [i for v in found for i in (v if isinstance(v, list | tuple) else [v]) if isinstance(i, int)]


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t)) ** 2 for t in tensors))


def _worst(wanted: Gradients, found: Gradients, whole: float) -> tuple[float, str]:
    """Return the largest ‖Δ‖/‖g‖ of a tensor, and its name.

    Args:
        wanted: the gradients g, by name.
        found: those that are compared; a missing one is 0.
        whole: the norm of all gradients.
    """
    worst = (0.0, "")
    for name in sorted(wanted.keys() | found.keys()):
        pair = [x for x in (wanted.get(name), found.get(name)) if x is not None]
        difference = _norm([pair[0] - pair[1]]) if len(pair) == 2 else _norm(pair)
        if difference <= VANISHING * whole:
            continue
        norm = _norm([wanted[name]]) if name in wanted else 0.0
        share = difference / norm if norm else math.inf
        if not share <= worst[0]:
            worst = (share, name)
    return worst


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no text"])[0]
