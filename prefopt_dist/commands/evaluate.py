"""`evaluate`: measure a model or checkpoint and write RUN/evaluation.json.

On data.eval it is compared with the reference by given responses, on evaluate.prompts with another model by the
answers of both.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.commands import export
from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.files import write_json
from prefopt_dist.model.folder import ModelFolder, inspect_folder
from prefopt_dist.monitoring import statistics
from prefopt_dist.monitoring.console import say, show
from prefopt_dist.monitoring.metrics_file import strict_json
from prefopt_dist.objectives import Objective, factory
from prefopt_dist.setup import compare, export_run, prepare_data, prepare_models, prepare_reference
from prefopt_dist.setup.open_run import run_folder
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.training.evaluation import evaluate


def run(config: Config) -> None:
    """Evaluate on any number of ranks (all ranks call it). A signal ends it at once: it has nothing to resume."""
    # A model folder needs no run: it is compared with the reference that the configuration names.
    with run_folder(config, begins=False, bare=config.evaluate.model is not None) as folder:
        if not config.data.eval and config.evaluate.prompts is None:
            raise AgreedUserError(
                "data.eval: not set, so there is nothing to evaluate on. Name a data set, or set evaluate.prompts."
            )
        given = None
        if config.evaluate.model is None:
            ranks.run_on_rank_zero(
                lambda: export.chosen_checkpoint(config)
            )  # there is none: said before the first pass
        else:
            given = _given("evaluate.model", config.evaluate.model, config)
        models = prepare_models.load_models(config, [] if given is None else [given])
        prepared = _prepared(config, models) if config.data.eval else None
        evaluated = _model(config, models, folder) if given is None else _Evaluated(str(config.evaluate.model), given)
        found: dict[str, Any] = {"model": evaluated.name}
        if prepared is not None:
            found |= _on_given(config, models, evaluated, *prepared)
        if config.evaluate.prompts is not None:
            against = models.reference
            if config.evaluate.against is not None:
                against = _given("evaluate.against", config.evaluate.against, config)
            comparison = compare.prepare(
                config, models, evaluated.model, against, models.reference, name=evaluated.name
            )
            found["answers"] = comparison.run()
        if ranks.rank() == 0:
            write_json(config.run_dir / "evaluation.json", strict_json(found))  # a model may have diverged
            if evaluated.temporary is not None:
                shutil.rmtree(evaluated.temporary)
        show(f"evaluated {evaluated.name}:")
        if prepared is not None:
            show(statistics.evaluation_text(found))
        if "answers" in found:
            show(compare.compared_text(found["answers"], evaluated.name, config.evaluate.against or "the reference"))


def _prepared(config: Config, models: Models) -> tuple[Objective, dict[str, ScoredRows]]:
    """Return the data sets of data.eval, scored by the reference."""
    objective = factory.make_objective(config.loss, models.dtype)
    evals = prepare_data.load_evals(config, models, objective)
    reference = prepare_reference.reference_weights(config, models, objective)
    scored, _ = prepare_reference.score_reference(
        config, models, list(evals.values()), reference, stop_asked=lambda: False
    )
    return objective, dict(zip(evals, scored, strict=True))


def _on_given(
    config: Config, models: Models, evaluated: _Evaluated, objective: Objective, sets: dict[str, ScoredRows]
) -> dict[str, Any]:
    """Return the metrics on given responses."""
    engine = prepare_reference.scoring_engine(config, models, evaluated.model, evaluated.adapters)
    found = evaluate(engine, objective, sets, config.reference_row_tokens)
    zero3.release(engine)
    del engine
    return statistics.with_intervals(found)


@dataclass(frozen=True)
class _Evaluated:
    """The model to evaluate."""

    name: str
    model: ModelFolder
    adapters: Path | None = None
    """Folder of adapters beside the model"""
    temporary: Path | None = None
    """Folder made for this evaluation alone"""


def _model(config: Config, models: Models, folder: RunFolder) -> _Evaluated:
    """Return the model of the run's checkpoint."""
    source = ranks.run_on_rank_zero(lambda: export.chosen_checkpoint(config))
    # As a model folder, or one of adapters, it can be loaded by any number of ranks.
    target = config.run_dir / ".evaluating"

    # An engine that answers takes whole models.
    merged = models.adapter is not None and config.evaluate.prompts is not None

    say(export_run.export_checkpoint(config, models, source, folder, target=target, merged=merged))
    if models.adapter is not None and not merged:
        return _Evaluated(source.name, models.policy, adapters=target, temporary=target)
    model = ranks.run_on_all_ranks(lambda: inspect_folder(target, "run.dir"))
    return _Evaluated(source.name, model, temporary=target)


def _given(key: str, name: str, config: Config) -> ModelFolder:
    """Return the checked model folder that a key names."""
    return ranks.run_on_all_ranks(lambda: prepare_models.model_folder(config, name, key))
