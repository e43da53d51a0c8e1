"""`reference`: run the first pass alone; safe to repeat, to interrupt and to run on another world size."""

from __future__ import annotations

from prefopt_dist.batching.order import first_rows
from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import AgreedUserError, StopRequested
from prefopt_dist.monitoring.console import say
from prefopt_dist.objectives import factory
from prefopt_dist.setup import prepare_data, prepare_models, prepare_reference
from prefopt_dist.setup.open_run import requests_for, run_folder


def run(config: Config) -> None:
    """Run the first pass (all ranks call it)."""
    with run_folder(config, begins=True) as folder:
        requests = requests_for(config)
        models = prepare_models.load_models(config)
        objective = factory.make_objective(config.loss, models.dtype)
        if not objective.needs_reference:
            raise AgreedUserError(f"loss.name: {config.loss.name!r} has no reference, so it needs no first pass.")
        if ranks.rank() == 0:
            folder.note(path=models.path)
        train = prepare_data.load_train(config, models, objective)
        evals = prepare_data.load_evals(config, models, objective)
        reference = prepare_reference.reference_weights(config, models, objective)
        try:
            _, done = prepare_reference.score_reference(
                config,
                models,
                [train, *evals.values()],
                reference,
                lambda: requests.look().stop,
                first_rows(*prepare_data.plan_steps(config, train), config.reference.update_every_steps),
            )
        except StopRequested:
            if ranks.rank() == 0:
                folder.write_stopped(requests.reason(), None, "in the first pass")
                requests.obeyed()
            say("stopped on request in the first pass; start again to go on")
            return
        assert done is not None
        if ranks.rank() == 0:
            folder.note(data=prepare_data.data_facts(train, evals), reference=done.as_run_json())
            requests.obeyed()
        say(
            f"done: {done.scored} sequences scored, {done.reused} reused; they lie in "
            f"{config.reference_store / done.key}, and every run with these weights and this data takes them from there"
        )
