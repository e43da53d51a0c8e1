"""`export`: a checkpoint to a Hugging Face folder, verified by loading it back. One process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt_dist.config import Config, to_dict
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.template import PLAIN_TEMPLATE, end_ids, read_template
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.stages import ingredients
from prefopt_dist.stages.base import refuse_other_base
from prefopt_dist.stages.ingredients import DTYPES, Models
from prefopt_dist.stages.job import run_folder
from prefopt_dist.stages.rows import text_options
from prefopt_dist.tracking import heartbeat
from prefopt_dist.tracking.console import say
from prefopt_dist.tracking.metrics_file import MetricsFile
from prefopt_dist.training import checkpoint
from prefopt_dist.training.best import best_step
from prefopt_dist.training.export import export, model_card
from prefopt_dist.training.manifest import read_manifest
from prefopt_dist.training.run_folder import RunFolder

BEST = "best"
"""In export.checkpoint: the one that checkpoint.keep_best keeps."""


def run(config: Config) -> None:
    """One process; more ranks only wait."""
    with run_folder(config, begins=False) as folder:
        models = ingredients.load_models(config)
        merged = config.export.merged
        say(ranks.decide(lambda: export_checkpoint(config, models, chosen_checkpoint(config), folder, merged=merged)))


def chosen_checkpoint(config: Config) -> Path:
    """The checkpoint that the configuration names, or the newest committed one."""
    if config.export.checkpoint not in (None, BEST):
        return Path(str(config.export.checkpoint))
    found = checkpoint.committed(config.run_dir / "checkpoints")
    if not found:
        raise UserError(f"run.dir: {config.run_dir} has no committed checkpoint to export. Train first.")
    return found[-1] if config.export.checkpoint is None else _best(config, found)


def _best(config: Config, found: list[Path]) -> Path:
    """The committed checkpoint that checkpoint.keep_best's metric calls the best."""
    metric = config.checkpoint.keep_best
    if metric is None:
        raise UserError(
            f"export.checkpoint: got {BEST!r}, but checkpoint.keep_best is null, so nothing says what is better; set "
            "it to a metric such as eval/loss or answers/reward"
        )
    steps = {int(path.name.removeprefix("step-")): path for path in found}
    step = best_step(MetricsFile(RunFolder(config.run_dir).metrics).rows(), metric, steps.keys())
    if step is None:
        raise UserError(
            f"export.checkpoint: got {BEST!r}, but no committed checkpoint's step has {metric}; name a checkpoint"
        )
    return steps[step]


def export_checkpoint(
    config: Config, models: Models, source: Path, folder: RunFolder, *, target: Path | None = None, merged: bool
) -> str:
    """Writes the folder and says so in one line; merged: of a run with adapters the whole model."""
    target = target or config.export_dir
    heartbeat.beat("the export")
    manifest = read_manifest(source)
    if manifest is not None:
        refuse_other_base(config, models, manifest)
    options = text_options(config)
    worst = export(
        source,
        model=models.policy,
        adapter=models.adapter,
        merged=merged,
        tokenizer=models.tokenizer,
        chat_template=_trained_template(models.tokenizer, config.data.template, options),
        ends=end_ids(read_template(models.tokenizer, config.data.template, options)),
        trained_dtype=models.dtype,
        dtype=DTYPES[config.export.dtype or config.model.dtype],
        target=target,
        card=model_card(
            base=config.model.name_or_path,
            loss=to_dict(config)["loss"],
            step=manifest.step if manifest else 0,
            run_id=folder.facts["run_id"],
            adapter=models.adapter is not None and not merged,
        ),
    )
    what = "" if models.adapter is None else " with its adapters added in" if merged else "'s adapters"
    said = f"exported {source.name}{what} to {target}"
    return f"{said}; loaded back, its log-probs differ by at most {worst:.1e} of their value"


def _trained_template(tokenizer: Any, mode: str, options: TextOptions) -> str | None:
    """The template that the export has in place of the tokenizer's; None: it keeps what it has."""
    if mode == "none":
        return None
    return options.chat_template or (PLAIN_TEMPLATE if tokenizer.chat_template is None else None)
