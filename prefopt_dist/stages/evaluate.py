"""`evaluate`: a model or checkpoint against the reference on data.eval, into RUN/evaluation.json."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import UserError
from prefopt_dist.files import write_json
from prefopt_dist.model.adapter import attach_saved
from prefopt_dist.model.load import ModelFolder, inspect_folder, load_sharded, resolve
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.stages import export, ingredients
from prefopt_dist.stages.ingredients import Models
from prefopt_dist.stages.job import run_folder
from prefopt_dist.tracking import evaluation_table
from prefopt_dist.tracking.console import say
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.run_folder import RunFolder


def run(config: Config) -> None:
    """All ranks, of any number. A signal ends it as it ends any process: there is nothing to go on with."""
    # A model folder needs no run: it is measured against the reference that the configuration names.
    with run_folder(config, begins=False, bare=config.evaluate.model is not None) as folder:
        if not config.data.eval:
            raise UserError("data.eval: not set, so there is nothing to evaluate on. Name a data set.")
        if config.evaluate.model is None:
            ranks.decide(lambda: export.chosen_checkpoint(config))  # there is none: said before the first pass
        else:
            _given(config)
        models = ingredients.load_models(config)
        objective = ingredients.make_objective(config.loss, models.dtype)
        evals = ingredients.load_evals(config, models, objective)
        reference = ingredients.reference_weights(config, models, objective)
        scored, _ = ingredients.score_reference(
            config, models, objective, list(evals.values()), reference, stop_asked=lambda: False
        )
        evaluated = _model(config, models, folder)
        settings = ingredients.reference_settings(config, models)
        lm = load_sharded(evaluated.model, dtype=models.dtype, settings=settings)
        if evaluated.adapters is not None:
            ranks.together(partial(attach_saved, lm, evaluated.adapters))
        engine = zero3.reference_engine(Scorer(lm), settings)
        found = evaluate(engine, objective, dict(zip(evals, scored, strict=True)), config.reference_micro_batch_tokens)
        zero3.release(engine)
        del engine
        found = evaluation_table.with_intervals(found)
        if ranks.rank() == 0:
            write_json(config.run_dir / "evaluation.json", {"model": evaluated.name, **found})
            if evaluated.temporary is not None:
                shutil.rmtree(evaluated.temporary)
        say(f"evaluated {evaluated.name}:\n{evaluation_table.text(found)}")


@dataclass(frozen=True)
class _Evaluated:
    """What is evaluated."""

    name: str
    model: ModelFolder
    adapters: Path | None = None
    """The folder of those that stand beside the model"""
    temporary: Path | None = None
    """A folder that was made for this alone"""


def _model(config: Config, models: Models, folder: RunFolder) -> _Evaluated:
    if config.evaluate.model is not None:
        return _Evaluated(config.evaluate.model, _given(config))
    source = ranks.decide(lambda: export.chosen_checkpoint(config))
    # As a model folder, or one of adapters, it can be loaded by any number of ranks.
    target = config.run_dir / ".evaluating"

    def exported() -> str:
        return export.export_checkpoint(config, models, source, folder, target=target, merged=False)

    say(ranks.decide(exported))
    if models.adapter is not None:
        return _Evaluated(source.name, models.policy, adapters=target, temporary=target)
    model = ranks.together(lambda: inspect_folder(target, "run.dir", config.data.max_length))
    return _Evaluated(source.name, model, temporary=target)


def _given(config: Config) -> ModelFolder:
    """The checked folder that `evaluate.model` names."""
    key, name = "evaluate.model", str(config.evaluate.model)
    return ranks.together(lambda: inspect_folder(resolve(name, key), key, config.data.max_length))
