"""Export a checkpoint of a run as a model folder, and push the folder to the hub."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.checkpoint import hub, save
from prefopt_dist.checkpoint.export import Exported, export
from prefopt_dist.checkpoint.manifest import read_manifest
from prefopt_dist.checkpoint.model_card import model_card
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.template import PLAIN_TEMPLATE, read_template, response_end_ids
from prefopt_dist.distributed import out_of_memory, ranks
from prefopt_dist.distributed.long_work import Node, run_on_node_leaders
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.setup.prepare_data import text_options
from prefopt_dist.setup.prepare_models import DTYPES, Models
from prefopt_dist.setup.prepare_reference import refuse_other_base, scoring_engine
from prefopt_dist.training.evaluation import best_step


@out_of_memory.phase("export")
def export_checkpoint(
    config: Config, models: Models, source: Path, folder: RunFolder, *, target: Path | None = None, merged: bool
) -> str:
    """Export a checkpoint and return a line that reports it (all ranks call it).

    Args:
        config: the configuration.
        models: of the run.
        source: the checkpoint's folder.
        folder: of the run.
        target: the folder to write; None for that of the configuration.
        merged: whether to export the whole model of a run with adapters, with them merged in.
    """
    target = target or config.export_dir
    heartbeat.beat("the export")

    def step() -> int:
        manifest = read_manifest(source)
        if manifest is None:
            return 0  # and the export refuses it
        refuse_other_base(config, models, manifest)
        return manifest.step

    of_step = ranks.run_on_rank_zero(step)

    def card() -> str:
        as_written = replace(config, export=replace(config.export, merged=merged))
        return model_card(as_written, folder.facts, MetricsFile(folder.metrics).rows(), of_step)

    def describe() -> Exported:
        options = text_options(config)
        return Exported(
            model=models.policy,
            adapter=models.adapter,
            merged=merged,
            tokenizer=models.tokenizer,
            chat_template=_trained_template(models.tokenizer, config.data.template, options),
            ends=response_end_ids(read_template(models.tokenizer, config.data.template, options)),
            trained_dtype=models.dtype,
            dtype=DTYPES[config.export.dtype or config.model.dtype],
            path=models.path,
            card=card() if ranks.rank() == 0 else "",  # rank 0 alone writes it
        )

    def load_for_check(model: ModelFolder, adapters: Path | None, dtype: torch.dtype) -> Any:
        return scoring_engine(config, models, model, adapters, dtype)

    worst = export(source, ranks.run_on_all_ranks(describe), target, load_for_check)
    what = "" if models.adapter is None else " with its adapters merged in" if merged else "'s adapters"
    return (
        f"exported {source.name}{what} to {target}; loaded back, its log-probs differ by at most {worst:.1e} of their "
        "value"
    )


def _trained_template(tokenizer: Any, mode: str, options: TextOptions) -> str | None:
    """Return the chat template that replaces the tokenizer's in the export; None to keep the tokenizer's."""
    if mode == "none":
        return None
    return options.chat_template or (PLAIN_TEMPLATE if tokenizer.chat_template is None else None)


def push_to_hub(config: Config) -> None:
    """Push the exported folder where the configuration asks for it; report a failure (all ranks call it)."""
    name = config.export.push_to_hub
    if name is None:
        return

    def push(node: Node) -> None:
        if node.number > 0:
            return
        say(f"pushing {config.export_dir} to {name} on the hub")
        try:
            why = hub.push(config.export_dir, name)
        except Exception as e:  # the run is done, whatever this is
            why = f"{type(e).__name__}: {e}"
        if why is None:
            say(f"pushed: {name}")
            return
        say(
            f"export.push_to_hub: {config.export_dir} was not pushed to {name!r}: {why}. The folder is whole, and the "
            "run is not affected. Check the network, and that HF_TOKEN may write there; then run the stage export with "
            "the same configuration, which pushes again.",
            logging.WARNING,
        )

    run_on_node_leaders(push)


def best_checkpoint(config: Config) -> save.Best:
    """Return how to choose the best of some checkpoints by the evaluations so far (rank 0)."""
    metric = config.checkpoint.keep_best
    if metric is None:
        return save.no_best
    rows = MetricsFile(RunFolder(config.run_dir).metrics).rows()
    return lambda steps: best_step(rows, metric, steps)
