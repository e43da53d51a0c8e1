"""The proof that a path computes a model's own log-probs and gradients, and the choice of a path by it."""

from __future__ import annotations

import time
from itertools import islice

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import PATHS, ComputePath
from prefopt_dist.distributed.out_of_memory import is_out_of_memory
from prefopt_dist.model.fusion import Fusion
from prefopt_dist.model.load import without_dropout
from prefopt_dist.model.proof.case import CAUSAL_TOLERANCE, GRADIENT_TOLERANCE, SUM_TOLERANCE, ProofCase
from prefopt_dist.model.proof.cut import MOST_BYTES, CannotCut, Cut, cuts, text_of
from prefopt_dist.model.proof.result import Proof, Refusal, Tried
from prefopt_dist.model.rotary import length_dependent

MOST_CUTS = 4
"""Cuts of different widths that are tried where plain transformers does not compute the first."""


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
) -> tuple[Cut, ProofCase] | Refusal:
    """Return the first cut that plain transformers computes."""
    why: Exception | None = None
    try:
        for small in islice(cuts(without_dropout(config), max_length, most_bytes), MOST_CUTS):
            try:
                return small, ProofCase(small, device, of_length=length_dependent(config, max_length))
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
