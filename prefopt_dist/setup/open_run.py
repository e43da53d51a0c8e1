"""Open a run: its folder, locked and under watch of a hang, the requests to it, its metrics and loggers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config, mask_secrets, to_dict
from prefopt_dist.distributed import ranks
from prefopt_dist.distributed.flight_recorder import FlightRecorder
from prefopt_dist.distributed.ranks import require_shared_folder
from prefopt_dist.distributed.watchdog import Watchdog
from prefopt_dist.errors import UserError
from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.health import HealthFinding, RunFacts, Watch
from prefopt_dist.monitoring.loggers import Logger, Loggers, TensorBoardLogger
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.wandb_logger import WandbLogger
from prefopt_dist.objectives import Objective
from prefopt_dist.training.job import Log
from prefopt_dist.training.stop import Requests


@contextmanager
def run_folder(config: Config, *, begins: bool, bare: bool = False) -> Iterator[RunFolder]:
    """Open and lock the run folder on rank 0, and check that all nodes share it, for a block (all ranks call it).

    Args:
        config: the configuration.
        begins: see RunFolder.open.
        bare: see RunFolder.open.
    """
    folder = RunFolder(config.run_dir)
    ranks.run_on_rank_zero(lambda: folder.open(config, world_size=ranks.world_size(), begins=begins, bare=bare))
    try:
        require_shared_folder(config.run_dir, "run.dir", remedy="Choose another folder.")
        with _watchdog(config):
            yield folder
    except UserError:
        folder.discard_unused()  # does something on rank 0 only, which has opened the folder
        raise
    finally:
        folder.close()


def _watchdog(config: Config) -> AbstractContextManager[object]:
    minutes = config.train.hang_minutes
    if minutes is None:
        return nullcontext()
    return Watchdog(
        config.run_dir,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        minutes=minutes,
        recorder=FlightRecorder.of_group(),
    )


def requests_for(config: Config) -> Requests:
    """Return this rank's view of the requests to the job, and start to catch signals as requests."""
    requests = Requests(config.run_dir, rank=ranks.rank(), max_hours=config.train.max_hours)
    requests.catch_signals()
    return requests


def open_log(config: Config, folder: RunFolder, start: int, total_steps: int, objective: Objective) -> Log:
    """Open the metrics file, the loggers and the health rules of a start, and remove rows after the step `start`.

    Args:
        config: the configuration.
        folder: of the run.
        start: the step after which the training resumes.
        total_steps: of the training.
        objective: of the training.
    """
    metrics = MetricsFile(folder.metrics)
    removed = metrics.truncate_to(start)
    if removed:
        say(f"metrics: {removed} rows after step {start} are removed, since these steps are trained again")
    folder.note_start_step(start)
    masked = mask_secrets(to_dict(config))
    wandb = masked["tracking"]["wandb"]
    facts = {name: folder.facts[name] for name in ("run_id", "data", "reference", "versions")}
    wandb_logger = WandbLogger(
        mode=wandb["mode"],
        project=wandb["project"],
        name=wandb["name"] or config.run_dir.name,
        group=wandb["group"],
        tags=wandb["tags"],
        run_id=folder.facts["wandb_id"],
        folder=folder.path,
        config=masked | {"made_of": facts},
        metrics=metrics,
    )
    loggers = (
        Loggers(wandb_logger, TensorBoardLogger(folder.path, metrics)) if config.tracking.tensorboard else wandb_logger
    )
    loggers.sync()
    start_loss = None if config.data.margin is not None else objective.start_loss  # with margins it depends on the data
    run_facts = RunFacts(total_steps, config.tracking.log_every_steps, start_loss)
    folder.note(training=run_facts.as_json())
    return Log(folder, metrics, loggers, _open_watch(config, folder, metrics, loggers, run_facts))


def _open_watch(config: Config, folder: RunFolder, metrics: MetricsFile, loggers: Logger, facts: RunFacts) -> Watch:
    reported = [(rule, step) for rule, step in folder.facts.get("health_told", [])]
    new_ones: list[HealthFinding] = []

    def report(new: list[HealthFinding], found: list[HealthFinding]) -> None:
        new_ones.extend(new)
        reported.extend((f.id, f.step) for f in new)
        folder.note(health=[f.as_json() for f in found], health_told=reported)
        for finding in new:
            say(finding.text(), logging.WARNING if finding.level == "warning" else logging.INFO)
            if finding.level == "warning":
                loggers.alert(finding.title, finding.text())

    watch = Watch(metrics, facts, config.health, reported, report)
    watch.look()
    for finding in watch.found:
        if finding.level == "warning" and finding not in new_ones:
            loggers.alert(finding.title, finding.text(), again=True)
    folder.note(health=[f.as_json() for f in watch.found])
    return watch
