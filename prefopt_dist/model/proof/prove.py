"""The proof that a path computes a model's own log-probs and gradients, and the choice of a path by it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from prefopt_dist.batching.micro_batch import PATHS, ComputePath
from prefopt_dist.batching.packing import pack
from prefopt_dist.distributed.out_of_memory import is_out_of_memory
from prefopt_dist.errors import UserError
from prefopt_dist.model.fusion import Fusion, fuse
from prefopt_dist.model.load import attention_of, without_dropout
from prefopt_dist.model.proof import alone, differences, sequences
from prefopt_dist.model.proof.alone import Gradients
from prefopt_dist.model.proof.cut import MOST_BYTES, CannotCut, Cut, cuts, text_of
from prefopt_dist.model.proof.weights import randomise
from prefopt_dist.model.rotary import length_dependent, length_dependent_types
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
MOST_CUTS = 4
"""Cuts of different widths that are tried where plain transformers does not compute the first."""
MOST_ROUNDING = 1e-3
"""A change of an earlier logit up to this is measured again in float64, since it may be rounding: sums over sequences
of another length have another order."""
CAUSAL_TOLERANCE = 1e-5
"""Largest change of an earlier logit by a later token, relative to the largest logit."""


@dataclass(frozen=True)
class Tried:
    """The result of one path."""

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
    no_memory: bool = False
    """Whether memory ran out, so that another time the path may be equal."""

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


@dataclass(frozen=True)
class Refusal:
    """The result of a proof that found no path, with what was tried."""

    why: str
    """Why the model is refused, with the numbers; the words after its dotted key."""
    remedy: str
    tried: tuple[Tried, ...] = ()
    no_memory: bool = False
    """Whether memory ran out before any path was tried."""

    def error(self, key: str, remedy: str | None = None, where: str = "") -> UserError:
        """Return the error for the user.

        Args:
            key: the dotted key that names the model.
            remedy: another remedy than the refusal's own, where a path was asked for.
            where: where the refusal was found.
        """
        return UserError(f"{key}: {self.why} {where}{self.remedy if remedy is None else remedy}")


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


def prove(
    config: PreTrainedConfig,
    *,
    key: str,
    path: ComputePath | None = None,
    remedy: str | None = None,
    max_length: int | None = None,
    device: torch.device | None = None,
    most_bytes: int = MOST_BYTES,
) -> Proof:
    """Return the most efficient path whose numbers are the model's own, on a cut of the model with random weights.

    Args:
        config: the model's configuration.
        key: the dotted key that names the model, for messages.
        path: the only path to try; None: all, in the order of `PATHS`.
        remedy: what to do where this path is not equal; None: to let all be tried.
        max_length: tokens of the run's longest sequence; None where unknown.
        device: where to compute; None: the CPU.
        most_bytes: largest size of the float32 weights of the cut.

    Raises:
        UserError: no path computes the model's own numbers, or the model is not causal, or no cut of it can be built.
    """
    found = try_paths(config, path=path, max_length=max_length, device=device, most_bytes=most_bytes)
    if isinstance(found, Refusal):
        raise found.error(key, remedy if found.tried else None)
    return found


def try_paths(
    config: PreTrainedConfig,
    *,
    path: ComputePath | None = None,
    max_length: int | None = None,
    device: torch.device | None = None,
    most_bytes: int = MOST_BYTES,
    fusion: Fusion = "none",
) -> Proof | Refusal:
    """Return what `prove` returns, or why it raises.

    Args:
        config: as in `prove`, as are path, max_length, device and most_bytes.
        path: see there.
        max_length: see there.
        device: see there.
        most_bytes: see there.
        fusion: how the path's layers are fused; plain transformers', with which it is compared, are not.
    """
    device = device or torch.device("cpu")
    # The run's own random numbers do not depend on whether its proof is found in the cache.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        return _prove(config, path, max_length, device, most_bytes, fusion)


def _prove(
    config: PreTrainedConfig,
    path: ComputePath | None,
    max_length: int | None,
    device: torch.device,
    most_bytes: int,
    fusion: Fusion,
) -> Proof | Refusal:
    begin = time.perf_counter()
    first = _first_that_works(config, max_length, most_bytes, device)
    if isinstance(first, Refusal):
        return first
    small, case = first
    if case.influence > CAUSAL_TOLERANCE:
        return Refusal(
            f"this {config.model_type} model is not causal: a later token changes an earlier logit by "
            f"{case.influence:.1e} of the largest, so that the log-prob of a token would depend on those after it.",
            "Give a causal language model.",
        )
    tried: list[Tried] = []
    for candidate in PATHS if path is None else (path,):
        tried.append(case.attempt(candidate, fusion))
        if tried[-1].equal:
            return Proof(candidate, tuple(tried), small.changes, case.influence, time.perf_counter() - begin)
    fused = "" if fusion == "none" else f" with model.compile={fusion}"
    which = f"no path{fused} computes" if path is None else f"the path {path}{fused} does not compute"
    return Refusal(
        f"{which} the numbers of this {config.model_type} model alone. "
        + "; ".join(t.text() for t in tried)
        + f". Allowed are {SUM_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e}.",
        "Give a model of another family." if path is None else "Set model.path=auto.",
        tuple(tried),
    )


def _first_that_works(
    config: PreTrainedConfig, max_length: int | None, most_bytes: int, device: torch.device
) -> tuple[Cut, _Case] | Refusal:
    """Return the first cut that plain transformers computes."""
    why: Exception | None = None
    try:
        for small in islice(cuts(without_dropout(config), max_length, most_bytes), MOST_CUTS):
            try:
                return small, _Case(small, device, of_length=length_dependent(config, max_length))
            except Exception as e:  # the family needs widths, or ratios of them, that this cut does not have
                why = why or e
    except CannotCut as e:
        why = why or e
    assert why is not None
    return Refusal(
        f"no small copy of this {config.model_type} model can be computed, so that no path can be proven "
        f"({why if isinstance(why, CannotCut) else text_of(why)}).",
        "Give a model of another family.",
        no_memory=is_out_of_memory(why),
    )


class _Case:
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
