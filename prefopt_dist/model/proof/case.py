"""A cut of a model with random weights, computed by plain transformers and by a path, and compared up to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.batching.packing import pack
from prefopt_dist.distributed.out_of_memory import is_out_of_memory
from prefopt_dist.model.fusion import Fusion, fuse
from prefopt_dist.model.load import attention_of
from prefopt_dist.model.proof import alone, differences, sequences
from prefopt_dist.model.proof.alone import Gradients
from prefopt_dist.model.proof.cut import Cut, text_of
from prefopt_dist.model.proof.result import Tried
from prefopt_dist.model.proof.weights import randomise
from prefopt_dist.model.rotary import length_dependent_types
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives.objective import Sequences, Terms, terms

SUM_TOLERANCE = 1e-6
"""Largest relative difference of a log-prob sum."""
GRADIENT_TOLERANCE = 1e-5
"""Largest ‖Δ‖/‖g‖ of the gradient of a tensor."""
NOISE_FACTOR = 3.0
"""Where float32 itself is not as exact, a difference of up to this many times that of plain float32 from float64 counts
as rounding."""
MOST_NOISE = 10.0
"""Rounding explains differences of up to this many times the tolerances."""
NEGLIGIBLE = 1e-5
"""A gradient that is smaller than this share of the whole may be rounding alone: some are 0 but for it, such as that of
a bias of keys, which shifts all scores of a query alike."""
MOST_ROUNDING = 1e-3
"""A change of an earlier logit up to this is measured again in float64, since it may be rounding: sums over sequences
of another length have another order."""
CAUSAL_TOLERANCE = 1e-5
"""Largest change of an earlier logit by a later token, relative to the largest logit."""


class _Weighted:
    """The loss Σ weight · log-prob, whose weights come in the place of the reference's log-probs."""

    responses = 2
    needs_reference = True
    needs_reference_point = False
    needs_squares = False
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


class ProofCase:
    """A cut with weights, and what plain transformers computes with them."""

    def __init__(self, small: Cut, device: torch.device, *, of_length: bool) -> None:
        self._config, self._device, self._of_length = small.config, device, of_length
        model = _build(small.config, "eager")
        randomise(model)  # on the host, so that every device proves the same weights
        model.to(device)
        self._state = {name: x.detach() for name, x in model.state_dict().items()}
        self._units = sequences.units(_tokens(small.config.to_dict()), _special(small.config.to_dict()))
        self._by = sequences.weights().to(device)
        ids = torch.from_numpy(np.concatenate([self._units[-1].prompt, self._units[-1].responses[1]]).astype(np.int64))
        self.influence = alone.influence_of_later_tokens(model, ids.to(device), of_length=of_length)
        if CAUSAL_TOLERANCE < self.influence <= MOST_ROUNDING:
            exact = self._filled("eager").double()
            with _float64_by_default():
                self.influence = alone.influence_of_later_tokens(exact, ids.to(device), of_length=of_length)
        self._sums, self._gradients = alone.sums_and_gradients(model, self._units, self._by)
        self._exact: tuple[torch.Tensor, Gradients] | None = None

    def attempt(self, path: ComputePath, fusion: Fusion = "none") -> Tried:
        """Compute the same by a path, and compare."""
        try:
            sums, gradients = self._by_path(path, fusion)
        except Exception as e:  # whatever the family's code or ours raises on this path ends it
            return Tried(path, False, why=text_of(e), no_memory=is_out_of_memory(e))
        found = self._compare(path, sums, gradients)
        if self._of_length and path != "alone":  # the tables of a cut may be too like each other to show it
            scalings = ", ".join(length_dependent_types(self._config))
            return replace(found, equal=False, why=f"the rotary scaling {scalings} looks at the longest of the row")
        return found

    def _by_path(self, path: ComputePath, fusion: Fusion) -> tuple[torch.Tensor, Gradients]:
        model = self._filled(attention_of(self._config, path))
        fuse(model, fusion)
        scorer = Scorer(model, path, cut=True).train()
        batch = pack(self._units, self._by.shape[1], path).to(self._device)
        found = scorer(batch, WEIGHTED, self._by)
        found.loss.backward()
        for part in scorer.rest():
            part.backward()  # type: ignore[no-untyped-call]
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
        sums_off = differences.relative(sums, self._sums)
        shares = {
            name: differences.share(gradients, self._gradients, name)
            for name in self._gradients.keys() | gradients.keys()
        }
        above = {name: share for name, share in shares.items() if not share <= GRADIENT_TOLERANCE}
        if not above and sums_off <= SUM_TOLERANCE:
            return Tried(path, True, sums_off, *differences.largest(shares))
        least = NEGLIGIBLE * differences.norm(self._gradients.values())
        negligible = {
            n for n in above if max(differences.size(self._gradients, n), differences.size(gradients, n)) <= least
        }
        rest = {n: share for n, share in above.items() if n not in negligible}
        # A float64 copy is made only where the difference is small enough to be rounding.
        if not (
            sums_off <= MOST_NOISE * SUM_TOLERANCE and differences.largest(rest)[0] <= MOST_NOISE * GRADIENT_TOLERANCE
        ):
            return Tried(path, False, sums_off, *differences.largest(rest or shares))
        try:
            exact_sums, exact = self._in_float64()
        except Exception as e:  # a family whose own code casts to float32
            why = f"its rounding is unknown, since float64 raises {text_of(e)}"
            return Tried(path, False, sums_off, *differences.largest(rest or shares), why)
        sums_noise = differences.relative(self._sums, exact_sums)
        noise = {n: differences.difference(self._gradients, exact, n) for n in above}
        factors = {n: MOST_NOISE if n in negligible else NOISE_FACTOR for n in above}
        unexplained = {
            n: above[n]
            for n in above
            if not differences.difference(gradients, self._gradients, n) <= factors[n] * noise[n]
        }
        equal = not unexplained and sums_off <= max(SUM_TOLERANCE, NOISE_FACTOR * sums_noise)
        reasons = [f"plain float32 differs from float64 by {sums_noise:.1e}"]
        if rest:
            largest = differences.largest(unexplained or rest)[1]
            reasons.append(f"and {noise[largest] / differences.size(exact, largest):.1e} in {largest}")
        if negligible - unexplained.keys():
            reasons.append(f"with {len(negligible - unexplained.keys())} gradients that are 0 but for rounding")
        shown = unexplained or {n: s for n, s in shares.items() if n not in negligible}
        return Tried(path, equal, sums_off, *differences.largest(shown), " ".join(reasons))

    def _in_float64(self) -> tuple[torch.Tensor, Gradients]:
        if self._exact is None:
            model = self._filled("eager").double()
            with _float64_by_default():
                self._exact = alone.sums_and_gradients(model, self._units, self._by)
        return self._exact


@contextmanager
def _float64_by_default() -> Iterator[None]:
    """Let the tensors that a family makes by itself, such as its mask, be float64, after the model is built."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _build(config: PreTrainedConfig, attention: str) -> Any:
    model: Any = AutoModelForCausalLM.from_config(
        type(config).from_dict(config.to_dict()), dtype=torch.float32, attn_implementation=attention
    )
    if attention == "eager":
        model.config._experts_implementation = "eager"  # a grouped product knows no float64
    return model.eval()


def _tokens(fields: dict[str, Any]) -> int:
    """Return the number of tokens that are not padding of the vocabulary."""
    given: list[int] = [fields[name] for name in ("vocab_size", "unpadded_vocab_size") if fields.get(name) is not None]
    return min(given)


def _special(fields: dict[str, Any]) -> list[int]:
    """Return the ids of special tokens."""
    found = [v for name, v in fields.items() if name.endswith(("token_id", "token_index"))]
    return [i for v in found for i in (v if isinstance(v, list | tuple) else [v]) if isinstance(i, int)]
