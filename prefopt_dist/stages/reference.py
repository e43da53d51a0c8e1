"""`reference`: the first pass alone; safe to repeat, to interrupt and to run on another world size."""

from __future__ import annotations

from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.reference.turn import StoppedInFirstPass
from prefopt_dist.stages import ingredients
from prefopt_dist.stages.job import requests_for, run_folder
from prefopt_dist.tracking.console import say


def run(config: Config) -> None:
    """All ranks."""
    with run_folder(config, begins=True) as folder:
        requests = requests_for(config)
        models = ingredients.load_models(config)
        objective = ingredients.make_objective(config.loss, models.dtype)
        if not objective.needs_reference:
            raise AgreedUserError(
                f"loss.name: {config.loss.name!r} has no reference, so there is no first pass to run."
            )
        train = ingredients.load_train(config, models, objective)
        evals = ingredients.load_evals(config, models, objective)
        reference = ingredients.reference_weights(config, models, objective)
        try:
            _, done = ingredients.score_reference(
                config, models, objective, [train, *evals.values()], reference, lambda: requests.look().stop
            )
        except StoppedInFirstPass:
            if ranks.rank() == 0:
                folder.stopped(requests.reason(), None, "in the first pass")
                requests.obeyed()
            say("stopped on request in the first pass; start again to go on")
            return
        assert done is not None
        if ranks.rank() == 0:
            folder.note(data=ingredients.data_facts(train, evals), reference=done.as_run_json())
            requests.obeyed()
        say(
            f"done: {done.scored} sequences scored, {done.reused} reused; they lie in "
            f"{config.reference_store / done.key}, and every run with these weights and this data takes them from there"
        )
