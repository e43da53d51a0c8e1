"""Check of an exported folder: loaded back, it must compute the log-probs that the trained policy had.

The policy's log-probs of a few rows are kept in each checkpoint's manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.batching.micro_batch import ComputePath, MicroBatch
from prefopt_dist.batching.row_parts import pack_part
from prefopt_dist.checkpoint.manifest import Manifest
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.distributed.sequence_group import ALONE, SequenceGroup
from prefopt_dist.model import adapter as adapters
from prefopt_dist.model.folder import ModelFolder, inspect_folder
from prefopt_dist.model.load import load_unsharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.reference.step0_check import RoundingTolerance

LoadSharded = Callable[[ModelFolder, Path | None, torch.dtype], Any]
"""Loads a model folder, and a folder of adapters beside it, into an engine that only scores (all ranks call it)."""

EXPORT_CHECK_ROWS = 4
"""The number of rows on which the exported model is compared with the trained policy."""


def record_export_check(engine: Any, data: ScoredRows, responses: int) -> dict[str, Any]:
    """Score the first rows of the data set for the checkpoint's manifest (all ranks call it).

    Each row is a micro-batch of its own, because only single rows are known to fit into the token budget.

    Args:
        engine: the DeepSpeed engine.
        data: the data set.
        responses: the number of responses of a unit.

    Returns:
        Token ids of the prompts and responses, and the log-probs of the responses, as plain values.
    """
    responses = min(responses, 2)  # without beginnings of responses
    rows = data.units(range(min(EXPORT_CHECK_ROWS, data.rows.n)), responses)
    units = [replace(unit, learnt=None) for unit in rows]  # every token counts, also one that is not learnt
    was_training = engine.module.training
    engine.module.eval()
    path, group = engine.module.path, engine.module.group
    sums = _score(engine, [pack_part([unit], responses, path, 1, group) for unit in units], ranks.device())
    engine.module.train(was_training)
    return {
        "prompts": [u.prompt.tolist() for u in units],
        "responses": [[r.tolist() for r in u.responses] for u in units],
        "sums": sums.tolist(),
    }


def export_check_batches(
    probe: dict[str, Any], path: ComputePath = "shared", group: SequenceGroup = ALONE
) -> tuple[list[MicroBatch], torch.Tensor]:
    """Return the micro-batches of the export check, one row in each and on the CPU, and the policy's log-probs.

    Args:
        probe: the result of `record_export_check`.
        path: how they are computed.
        group: the ranks that share each row.

    Returns:
        The micro-batches, and the log-probs as float64 [U, R].
    """
    units = [
        Unit(
            i, np.array(p, dtype=np.int32), tuple(np.array(r, dtype=np.int32) for r in rs), ranks=tuple(range(len(rs)))
        )
        for i, (p, rs) in enumerate(zip(probe["prompts"], probe["responses"], strict=True))
    ]
    sums = torch.tensor(probe["sums"], dtype=torch.float64)
    return [pack_part([unit], sums.shape[1], path, 1, group) for unit in units], sums


def verify(
    folder: Path,
    base: ModelFolder | None,
    manifest: Manifest,
    dtype: torch.dtype,
    trained: torch.dtype,
    load_sharded: LoadSharded | None,
    path: ComputePath = "shared",
) -> float:
    """Load the exported folder as a user would and compare its log-probs with the trained policy's (all ranks call it).

    Args:
        folder: the exported folder.
        base: the base model of a folder that holds adapters only; None for a whole model.
        manifest: the checkpoint's manifest, which has the rows of the export check and the policy's log-probs.
        dtype: the dtype of the exported weights.
        trained: the dtype of the forward pass in training.
        load_sharded: loads the folder on all ranks; None has rank 0 load the whole model.
        path: how the rows are computed, which is that of the training.

    Returns:
        The largest relative difference.

    Raises:
        RuntimeError: the log-probs differ by more than rounding explains.
    """
    probe = manifest.facts["probe"]
    batches, expected = export_check_batches(probe, path)

    def inspect() -> ModelFolder:
        return base or inspect_folder(folder, "export.dir")

    def score_whole() -> torch.Tensor:
        lm = load_unsharded(inspect(), dtype=dtype, path=path)
        if base is not None:
            adapters.load_with_peft(lm, folder)
        return _score(Scorer(lm, path), batches, torch.device("cpu"))

    if load_sharded is None:
        sums = ranks.run_on_rank_zero(score_whole)
    else:
        engine = load_sharded(ranks.run_on_all_ranks(inspect), None if base is None else folder, dtype)
        try:
            sums = _score(engine, export_check_batches(probe, path, engine.module.group)[0], ranks.device())
        finally:
            zero3.release(engine)
            del engine
    tokens = torch.cat([batch.counts[batch.units] for batch in batches])
    coarser = torch.bfloat16 if torch.bfloat16 in (dtype, trained) else dtype

    def compare() -> float:
        rounding = RoundingTolerance.of_model(inspect().config, coarser)
        times = float(rounding.ratio(sums, expected, tokens).max())
        difference = float(((sums - expected).abs() / expected.abs().clamp(min=1.0)).max())
        if times > 1:
            raise RuntimeError(
                f"the exported model's log-probs differ from the trained policy's by {difference:.2e} of their value, "
                f"which is {times:.3g} times what rounding explains in {coarser}; nothing was exported"
            )
        return difference

    return ranks.run_on_rank_zero(compare)  # one decision


def _score(scorer: Any, batches: list[MicroBatch], device: torch.device) -> torch.Tensor:
    """Return the log-probs of the rows' responses, float64 [U, R] on the CPU."""
    with torch.no_grad():
        return torch.cat([scorer(batch.to(device)).cpu()[batch.units] for batch in batches])
