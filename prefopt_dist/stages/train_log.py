"""Rank 0's outlets of a training: metrics, Weights & Biases, TensorBoard, and the health rules that watch the rows."""

from __future__ import annotations

from prefopt_dist.config import Config, mask_secrets, to_dict
from prefopt_dist.objectives import Objective
from prefopt_dist.tracking.console import say
from prefopt_dist.tracking.feed import Feed, Feeds
from prefopt_dist.tracking.health import Finding, RunFacts, Watch
from prefopt_dist.tracking.metrics_file import MetricsFile
from prefopt_dist.tracking.tensorboard_feed import TensorBoardFeed
from prefopt_dist.tracking.wandb_feed import WandbFeed
from prefopt_dist.training.loop import Log
from prefopt_dist.training.run_folder import RunFolder


def open_log(config: Config, folder: RunFolder, start: int, total_steps: int, objective: Objective) -> Log:
    """Return the outlets of a start that goes on from step `start`; later rows are cut off."""
    metrics = MetricsFile(folder.metrics)
    again = metrics.cut_back(start)
    if again:
        say(f"metrics: {again} rows after step {start} are written again")
    folder.note_start_step(start)
    masked = mask_secrets(to_dict(config))
    wandb = masked["tracking"]["wandb"]
    made_of = {name: folder.facts[name] for name in ("run_id", "data", "reference", "versions")}
    wandb_feed = WandbFeed(
        mode=wandb["mode"],
        project=wandb["project"],
        name=wandb["name"] or config.run_dir.name,
        group=wandb["group"],
        tags=wandb["tags"],
        run_id=folder.facts["wandb_id"],
        folder=folder.path,
        config=masked | {"made_of": made_of},
        metrics=metrics,
    )
    feeds = Feeds(wandb_feed, TensorBoardFeed(folder.path, metrics)) if config.tracking.tensorboard else wandb_feed
    feeds.feed()
    facts = RunFacts(total_steps, config.tracking.log_every_steps, objective.start_loss)
    folder.note(training=facts.as_json())
    return Log(folder, metrics, feeds, _open_watch(config, folder, metrics, feeds, facts))


def _open_watch(config: Config, folder: RunFolder, metrics: MetricsFile, feeds: Feed, facts: RunFacts) -> Watch:
    told = [(rule, step) for rule, step in folder.facts.get("health_told", [])]
    new_ones: list[Finding] = []

    def tell(new: list[Finding], found: list[Finding]) -> None:
        new_ones.extend(new)
        told.extend((f.id, f.step) for f in new)
        folder.note(health=[f.as_json() for f in found], health_told=told)
        for finding in new:
            say(finding.text())
            if finding.level == "warning":
                feeds.alert(finding.title, finding.text())

    watch = Watch(metrics, facts, config.health, told, tell)
    watch.look()
    for finding in watch.found:
        if finding.level == "warning" and finding not in new_ones:
            feeds.alert(finding.title, finding.text(), again=True)
    folder.note(health=[f.as_json() for f in watch.found])
    return watch
