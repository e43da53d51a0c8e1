"""Open a run's folder and loggers, and finish a training: answers, verdict, export, DONE."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.checkpoint import hub, save
from prefopt_dist.checkpoint.export import Exported, export
from prefopt_dist.checkpoint.manifest import read_manifest
from prefopt_dist.checkpoint.model_card import model_card
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config, mask_secrets, to_dict
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.template import PLAIN_TEMPLATE, read_template, response_end_ids
from prefopt_dist.distributed import out_of_memory, ranks, zero3
from prefopt_dist.distributed.flight_recorder import FlightRecorder
from prefopt_dist.distributed.long_work import Node, run_on_node_leaders
from prefopt_dist.distributed.ranks import require_shared_folder
from prefopt_dist.distributed.watchdog import Watchdog
from prefopt_dist.errors import StopRequested, UserError
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.health import HealthFinding, RunFacts, Watch
from prefopt_dist.monitoring.loggers import Logger, Loggers, TensorBoardLogger
from prefopt_dist.monitoring.metrics_file import MetricsFile, Row
from prefopt_dist.monitoring.timers import peak_memory
from prefopt_dist.monitoring.verdict import Verdict, not_judged, verdict
from prefopt_dist.monitoring.wandb_logger import WandbLogger
from prefopt_dist.objectives import Objective
from prefopt_dist.setup import own_answers
from prefopt_dist.setup.own_answers import NotAnswered, OwnAnswers, PolicyAnswers
from prefopt_dist.setup.prepare_data import text_options
from prefopt_dist.setup.prepare_models import DTYPES, Models
from prefopt_dist.setup.prepare_reference import refuse_other_base, scoring_engine
from prefopt_dist.training.evaluation import best_step
from prefopt_dist.training.job import Job, Log
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


def best_checkpoint(config: Config) -> save.Best:
    """Return how to choose the best of some checkpoints by the evaluations so far (rank 0)."""
    metric = config.checkpoint.keep_best
    if metric is None:
        return save.no_best
    rows = MetricsFile(RunFolder(config.run_dir).metrics).rows()
    return lambda steps: best_step(rows, metric, steps)


def finish(config: Config, folder: RunFolder, models: Models, job: Job, answers: OwnAnswers | NotAnswered) -> None:
    """Finish a run after its last checkpoint: answer, release the engine, judge, export and write DONE.

    All ranks call it. A stop that is requested while the policy answers is obeyed, and the next start continues there.
    """

    def stop_asked() -> bool:
        return job.requests.look().stop

    start_time = time.perf_counter()
    try:
        policy = answers.answer(job.engine, job.total_steps, stop_asked) if isinstance(answers, OwnAnswers) else None
        _release_engine(job)
        row = None
        if isinstance(answers, OwnAnswers) and policy:
            row = _answers_row(job, answers, policy, start_time, stop_asked)
    except StopRequested:
        _release_engine(job)
        _stop(folder, job)
        return

    def judge() -> Verdict:
        if isinstance(answers, NotAnswered):
            judgement, block = not_judged(answers.reason), {}
        else:
            assert row is not None
            judgement = verdict(row, config.health, str(config.export_dir))
            block = own_answers.as_run_json(answers, row)
        folder.note(answers={**block, "verdict": judgement.word, "verdict_text": judgement.text})
        return judgement

    judgement = ranks.run_on_rank_zero(judge)
    source = config.run_dir / "checkpoints" / save.folder_name(job.total_steps)
    exported = export_checkpoint(config, models, source, folder, merged=config.export.merged)

    def conclude() -> str:
        log = job.log
        assert log is not None
        if isinstance(answers, OwnAnswers) and policy is not None:
            log.loggers.samples(answers.samples(policy))
        log.loggers.verdict(judgement.word, judgement.text)
        if (metric := config.checkpoint.keep_best) is not None:  # the final answers came after the last checkpoint
            steps = [save.step_of(path) for path in save.committed(source.parent)]
            folder.note(best={"metric": metric, "step": best_checkpoint(config)(steps)})
        summary = _summary(config, log.metrics.rows(), job.total_steps, exported, judgement.text)
        folder.note(memory=folder.facts["memory"] | {"peak_bytes": peak_memory()})
        folder.write_done(summary)
        job.requests.obeyed()
        log.loggers.finish()
        return summary

    say(ranks.run_on_rank_zero(conclude))
    push_to_hub(config)


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


def _release_engine(job: Job) -> None:
    job.answer = None  # it has a reference to the engine
    if job.engine is not None:
        zero3.release(job.engine)
        job.engine = None


def _stop(folder: RunFolder, job: Job) -> None:
    where = "while the trained model answers"
    if job.log is not None:
        folder.write_stopped(job.requests.reason(), job.total_steps, where)
        job.requests.obeyed()
        job.log.loggers.finish()
    say(f"stopped on request {where}; start again to continue")


def _answers_row(
    job: Job, answers: OwnAnswers, policy: PolicyAnswers, start_time: float, stop_asked: Callable[[], bool]
) -> Row:
    """Return the row of metrics of the policy's answers, and write it if no earlier start has (all ranks call it).

    Args:
        job: the training.
        answers: the run's prompts and start answers.
        policy: the policy's answers.
        start_time: when the answers were begun, in seconds of time.perf_counter.
        stop_asked: whether this rank was asked to stop.
    """
    step = job.total_steps

    def written() -> Row | None:
        assert job.log is not None
        rows = [row for row in job.log.metrics.rows() if (row["kind"], row["step"]) == ("answers", step)]
        return rows[0] if rows else None

    if ranks.run_on_rank_zero(written) is None:
        metrics = answers.final_metrics(policy, stop_asked)
        seconds = {"perf/answers_seconds": time.perf_counter() - start_time}
        if job.log is not None:
            job.log.write("answers", step, job.order.step(step - 1), metrics | seconds)
    row: Row | None = ranks.run_on_rank_zero(written)
    assert row is not None
    return row


def _summary(config: Config, rows: list[dict[str, Any]], steps: int, exported: str, verdict: str) -> str:
    lines = [f"done: {steps} steps, {rows[-1]['pairs_seen']} rows seen"]
    for kind in ("train", "eval"):
        of_kind = [r for r in rows if r["kind"] == kind]
        # Only names in both rows, since data.eval may have changed between the starts.
        in_both = [n for n in of_kind[0] if n in of_kind[-1]] if of_kind else []
        for name in in_both:
            if name.endswith(("/loss", "/rewards/accuracies", "/rewards/margins")):
                lines.append(f"  {name}: {of_kind[0][name]:.4f} at first, {of_kind[-1][name]:.4f} at last")
    lines += [
        f"  {exported}",
        f"  {verdict}",
        f"  curves: {config.run_dir / 'metrics.jsonl'}; checkpoints, configuration and versions beside it",
    ]
    return "\n".join(lines)


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
