"""Compare each loss with TRL's on the same small model and rows: python -m benchmarks.parity.

Float32 on one CPU thread; the reference is another model than the policy. A row of the table is one loss: the mean over
the rows, ours and TRL's, their relative difference, and that of the whole gradient, ‖Δ‖/‖g‖. The exit status is 1 where
a difference is larger than the tolerance. Where TRL's loss is defined differently (see docs/losses.md), the table names
the common term that is compared.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.floor import Shape
from benchmarks.pairs import Lengths, Mix, draw_pairs
from benchmarks.parity_cases import Rows, Value, cases
from benchmarks.world import write_model
from prefopt_dist.batching.packing import pack
from prefopt_dist.config.build import build_config
from prefopt_dist.data.unit import Unit
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.model.load import load_unsharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import KTO, SFT, Sequences
from prefopt_dist.objectives.factory import make_objective

LOSS_TOLERANCE = 2e-5
"""Tolerated relative difference of a loss: that of float32 log-probs, as the loss amplifies it."""
GRADIENT_TOLERANCE = 2e-4
"""Tolerated relative difference of the whole gradient, ‖Δ‖/‖g‖."""
SHAPE = Shape(vocabulary=211, hidden=48, mlp=96, layers=2, heads=4, key_value_heads=2, head_size=12, tied=True)
LENGTHS = Mix(Lengths(12, 0.5, 4, 30), Lengths(14, 0.7, 2, 40))
PAIRS = 12


def main() -> int:
    """Run the comparison in a temporary folder; return the exit status."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder))


def compare(folder: Path) -> int:
    """Print the table; return 1 where a line exceeds the tolerance."""
    from benchmarks.parity_peer import Peer, version

    for seed, name in enumerate(("policy", "reference")):
        write_spread_model(folder / name, seed)
    rows = draw_pairs(LENGTHS, PAIRS, SHAPE.vocabulary, seed=5)
    ours, theirs = Ours(folder), Peer(folder)
    print(f"{PAIRS} pairs; TRL {version()}; float32\n")
    print("| ours | TRL | compared | loss, ours | loss, TRL | difference | of the gradient |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    failed = False
    for case in cases():
        name = "mix" if "of" in case.options else case.ours.split(",")[0]
        mine = ours.pairs({"name": name, **case.options}, rows, less_sft=case.less_sft)
        failed |= print_line(case.ours, case.theirs, case.only or "loss", mine, case.peer(theirs, rows))
    rated = [(p, c if i % 3 else r, i % 3 != 0) for i, (p, c, r) in enumerate(rows)]
    options = {"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.4}
    kl, value = theirs.kto(rated, 0.1, 1.4, "kto")
    z0, mine = ours.kto(options, rated)
    failed |= print_line("kto", "KTO", "loss, z₀ of TRL's partners", mine, value)
    failed |= print_line("kto", "KTO", "z₀ alone", Value(z0, {}), Value(kl, {}))
    _, value = theirs.kto(rated, 0.1, 1.4, "apo_zero_unpaired")
    _, mine = ours.kto({**options, "reference_point": "zero"}, rated)
    failed |= print_line("kto, reference_point: zero", "KTO apo_zero_unpaired", "loss", mine, value)
    return int(failed)


def print_line(ours: str, theirs: str, what: str, mine: Value, value: Value) -> bool:
    """Print one line; return whether it exceeds the tolerance."""
    loss = abs(mine.loss - value.loss) / max(abs(value.loss), 1e-30)
    slope = 0.0
    if mine.gradient:
        apart = sum((mine.gradient[n] - value.gradient[n]).square().sum() for n in mine.gradient)
        whole = sum(g.square().sum() for g in value.gradient.values())
        slope = float(torch.as_tensor(apart / whole).sqrt())
    bad = not (loss <= LOSS_TOLERANCE and slope <= GRADIENT_TOLERANCE)
    slope_text = f"{slope:.1e}" if mine.gradient else "–"
    print(
        f"| {ours} | {theirs} | {what} | {mine.loss:.6f} | {value.loss:.6f} | {loss:.1e} | {slope_text} |"
        + ("  BEYOND THE TOLERANCE" if bad else ""),
        flush=True,
    )
    return bad


def write_spread_model(folder: Path, seed: int) -> None:
    """Write a model whose log-probs differ widely, so that every loss is far from its value at the start."""
    from safetensors.torch import load_file, save_file

    write_model(folder, SHAPE, "float32", seed)
    file = folder / "model.safetensors"
    tensors = {name: t * 3 if t.dim() > 1 else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


class Ours:
    """This package's scorer and objectives, without an engine."""

    def __init__(self, folder: Path) -> None:
        policy, reference = (
            Scorer(load_unsharded(inspect_folder(folder / name, "model"), dtype=torch.float32))
            for name in ("policy", "reference")
        )
        self.policy, self.reference = policy.train(), reference.eval()

    def pairs(self, options: dict[str, Any], rows: Rows, *, less_sft: bool) -> Value:
        """Return the mean loss of the pairs, without −log π per token of the chosen response where `less_sft`."""
        objective = make_objective(_loss(options), torch.float32)
        beginnings = objective.responses == 4
        units = [
            Unit(
                i,
                np.array(p, np.int32),
                (np.array(c, np.int32), np.array(r, np.int32)),
                prefix=min(len(c), len(r)) if beginnings else None,
            )
            for i, (p, c, r) in enumerate(rows)
        ]
        if objective.needs_squares:  # it takes the head's own pass
            batch = pack(units, objective.responses)
            with torch.no_grad():
                reference = self.reference(batch)[batch.units]
            return self._value(self.policy(batch, objective, reference).loss / len(rows))
        sequences = self._sequences(units, objective.responses)
        if not objective.needs_reference:
            sequences = replace(sequences, reference=None)
        if objective.couples_units:
            assert sequences.reference is not None
            partners = objective.partners(sequences.sums.detach(), sequences.reference, torch.arange(len(rows)))
            sequences = replace(sequences, partner=partners)
        loss = objective(sequences).loss
        if less_sft:
            loss = loss - SFT()(sequences).loss
        return self._value(loss / len(rows))

    def kto(self, options: dict[str, Any], rated: list[tuple[list[int], list[int], bool]]) -> tuple[float, Value]:
        """Return z₀ and the mean loss of rated rows; a row's mismatched response is the previous row's, as in TRL."""
        objective = make_objective(_loss(options), torch.float32)
        assert isinstance(objective, KTO)

        def units(shift: int) -> list[Unit]:
            return [
                Unit(i, np.array(p, np.int32), (np.array(rated[i - shift][1], np.int32),), desirable=good)
                for i, (p, _, good) in enumerate(rated)
            ]

        with torch.no_grad():
            apart = self._sequences(units(1), 1)
            assert apart.reference is not None
            z0 = (apart.sums - apart.reference).mean().clamp(min=0)
        terms = replace(objective, z0=z0)(self._sequences(units(0), 1))
        return float(z0), self._value(terms.loss / len(rated))

    def _sequences(self, units: list[Unit], responses: int) -> Sequences:
        batch = pack(units, responses)
        with torch.no_grad():
            reference = self.reference(batch)[batch.units]
        return Sequences(self.policy(batch)[batch.units], batch.counts[batch.units], reference, batch.desirable)

    def _value(self, loss: torch.Tensor) -> Value:
        self.policy.zero_grad()
        loss.backward()
        gradient = {n: p.grad.double().clone() for n, p in self.policy.lm.named_parameters() if p.grad is not None}
        return Value(loss.item(), gradient)


def _loss(options: dict[str, Any]) -> Any:
    """Return the options as the configuration builds them."""
    needed = {"run": {"dir": "x"}, "model": {"name_or_path": "x"}, "data": {"train": "x"}}
    return build_config({**needed, "loss": options}).loss


if __name__ == "__main__":
    sys.exit(main())
