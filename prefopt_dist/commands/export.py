"""`export`: export a checkpoint to a Hugging Face folder, verified by loading it back."""

from __future__ import annotations

from pathlib import Path

from prefopt_dist.checkpoint import save
from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.monitoring.console import say
from prefopt_dist.setup import prepare_models
from prefopt_dist.setup.export_run import best_checkpoint, export_checkpoint, push_to_hub
from prefopt_dist.setup.open_run import run_folder

BEST = "best"
"""Value of export.checkpoint: the checkpoint that checkpoint.keep_best keeps"""


def run(config: Config) -> None:
    """Export on all ranks, each its share of the files."""
    with run_folder(config, begins=False) as folder:
        models = prepare_models.load_models(config, trains=False)
        source = ranks.run_on_rank_zero(lambda: chosen_checkpoint(config))
        say(export_checkpoint(config, models, source, folder, merged=config.export.merged))
        push_to_hub(config)


def chosen_checkpoint(config: Config) -> Path:
    """Return the checkpoint that the configuration names, or the newest committed one."""
    if config.export.checkpoint not in (None, BEST):
        return Path(str(config.export.checkpoint))
    found = save.committed(config.run_dir / "checkpoints")
    if not found:
        raise UserError(f"run.dir: {config.run_dir} has no committed checkpoint to export. Train first.")
    return found[-1] if config.export.checkpoint is None else _best(config, found)


def _best(config: Config, found: list[Path]) -> Path:
    """Return the committed checkpoint that is best by the metric of checkpoint.keep_best."""
    metric = config.checkpoint.keep_best
    if metric is None:
        raise UserError(
            f"export.checkpoint: got {BEST!r}, but checkpoint.keep_best is null, so nothing says what is better; set "
            "it to a metric such as eval/loss or answers/reward"
        )
    steps = {save.step_of(path): path for path in found}
    step = best_checkpoint(config)(steps.keys())
    if step is None:
        raise UserError(
            f"export.checkpoint: got {BEST!r}, but no committed checkpoint's step has {metric}; name a checkpoint"
        )
    return steps[step]
