"""Cases of rank_cases.py with a reference that moves (reference.update_every_steps)."""

from functools import partial
from pathlib import Path
from typing import Any

import float64_steps
import plain
import pytest
import rank_jobs
import torch

from prefopt_dist.batching.order import Order
from prefopt_dist.commands import train
from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.training.moving_reference import FOLDER, MovingReference


def moved_values(folder: Path) -> dict:
    """The values of an update beside float64's, of the rows that are due; the others stay."""
    config = rank_jobs.config_for(
        folder, "moved", reference={"name_or_path": str(folder / "reference")}, train={"global_batch_pairs": 5}
    )
    models, _, scored, _ = rank_jobs.ready(config)
    engine = rank_jobs.make_policy(config, models)
    order = Order.of_run(scored.rows.source, scored.rows.weights, config.run.seed, 5)
    moving = MovingReference.of(scored, every=2, order=order, total_steps=7, budget=150, run_dir=config.run_dir)
    ranks.run_on_rank_zero(lambda: config.run_dir.mkdir(parents=True, exist_ok=True))
    assert not moving.update(engine, 2, lambda: ranks.rank() == 1 or ranks.world_size() == 1)
    untouched = torch.equal(moving.data.reference, scored.reference)
    assert moving.update(engine, 2, lambda: False)
    assert engine.module.training
    values = moving.data.reference.clone()
    due = order.rows_between(2, 4).tolist()
    exact = plain.build_plain(folder / "model")
    with torch.no_grad():
        expected = float64_steps.plain_pairs(exact, scored.rows, due)
    others = [i for i in range(scored.rows.n) if i not in due]
    again = MovingReference.of(scored, every=2, order=order, total_steps=7, budget=150, run_dir=config.run_dir)
    again.restore(3)
    file = config.run_dir / FOLDER / "step-00000002.npz"
    ranks.run_on_rank_zero(lambda: file.write_bytes(file.read_bytes()[:-200]))
    with pytest.raises(AgreedUserError, match=r"step-00000002\.npz is damaged"):
        again.restore(3)
    ranks.run_on_rank_zero(file.unlink)
    with pytest.raises(AgreedUserError, match=r"step-00000002\.npz is missing"):
        again.restore(3)
    # A checkpoint of step 4 needs no values of before.
    ranks.run_on_rank_zero(lambda: file.write_bytes(b"older"))
    ranks.run_on_rank_zero(lambda: (config.run_dir / "checkpoints" / "step-00000004").mkdir(parents=True))
    assert moving.update(engine, 4, lambda: False)
    kept = ranks.run_on_rank_zero(lambda: sorted(path.name for path in file.parent.iterdir()))
    zero3.release(engine)
    return {
        "untouched": untouched,
        "worst": ((values[due] - expected) / expected).abs().max().item(),
        "moved": (values[due] - scored.reference[due]).abs().min().item(),
        "others": torch.equal(values[others], scored.reference[others]),
        "start": torch.equal(again.data.reference, values),
        "kept": kept,
        "due": len(due),
    }


def moving_reference(folder: Path) -> dict:
    """DPO and KTO over six steps; DPO once more, crashed between two updates and after one, and stopped in one."""
    found: dict[str, Any] = {}
    dpo: dict[str, object] = {"name": "dpo", "beta": 0.5}
    kto: dict[str, object] = {"name": "kto", "beta": 0.5, "split_pairs": True}
    for name, loss in (("whole", dpo), ("crashed", dpo), ("kto", kto)):
        config = _config(folder, name, loss)
        if name == "crashed":
            for steps in (4, 2):
                with rank_jobs.Crash(step=steps), pytest.raises(ConnectionAbortedError):
                    train.run(config)
            with _StopInUpdate(config.run_dir):
                train.run(config)
            found["stopped"] = ranks.run_on_rank_zero((config.run_dir / "STOPPED").read_text)
        train.run(config)
        found[name] = ranks.run_on_rank_zero(partial(rank_jobs.the_end, config.run_dir))
    return found


def _config(folder: Path, name: str, loss: dict[str, object]) -> Config:
    return rank_jobs.config_for(
        folder,
        f"moving-{name}",
        loss=loss,
        data={"eval": str(folder / "pairs.jsonl")},
        reference={"update_every_steps": 2, "store": str(folder / f"store-{name}")},
        train={"max_steps": 6, "global_batch_pairs": 5},
        optim={"learning_rate": 1e-3},
        eval={"every_steps": 3},
        checkpoint={"every_steps": 3},
    )


class _StopInUpdate:
    """Somebody asks for a stop as an update of the reference begins."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def __enter__(self) -> None:
        self._scored = MovingReference._scored
        scored, run_dir = self._scored, self._run_dir

        def ask(moving: MovingReference, *args: Any) -> torch.Tensor | None:
            ranks.run_on_rank_zero((run_dir / "STOP").touch)
            return scored(moving, *args)

        MovingReference._scored = ask

    def __exit__(self, *_: object) -> None:
        MovingReference._scored = self._scored
