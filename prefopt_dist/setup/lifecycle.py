"""Open a run's folder and loggers, and finish a training: answers, verdict, export, DONE."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from prefopt_dist.checkpoint import save
from prefopt_dist.checkpoint.export import export, model_card
from prefopt_dist.checkpoint.manifest import read_manifest
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config, mask_secrets, to_dict
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.template import PLAIN_TEMPLATE, read_template, response_end_ids
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.distributed.ranks import require_shared_folder
from prefopt_dist.distributed.watchdog import Watchdog
from prefopt_dist.errors import StopRequested, UserError
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.health import HealthFinding, RunFacts, Watch
from prefopt_dist.monitoring.loggers import Logger, Loggers, TensorBoardLogger
from prefopt_dist.monitoring.metrics_file import MetricsFile, Row
from prefopt_dist.monitoring.timers import peak_memory
from prefopt_dist.monitoring.verdict import not_judged, verdict
from prefopt_dist.monitoring.wandb_logger import WandbLogger
from prefopt_dist.objectives import Objective
from prefopt_dist.setup import own_answers
from prefopt_dist.setup.own_answers import NotAnswered, OwnAnswers, PolicyAnswers
from prefopt_dist.setup.prepare_data import text_options
from prefopt_dist.setup.prepare_models import DTYPES, Models
from prefopt_dist.setup.prepare_reference import refuse_other_base
from prefopt_dist.training import loop
from prefopt_dist.training.evaluation import best_step
from prefopt_dist.training.loop import Log
from prefopt_dist.training.stop import Requests


@contextmanager
def run_folder(config: Config, *, begins: bool, bare: bool = False) -> Iterator[RunFolder]:
    """All ranks: rank 0 has opened and locked the folder, and every node sees it; begins, bare as in RunFolder.open."""
    folder = RunFolder(config.run_dir)
    ranks.run_on_rank_zero(lambda: folder.open(config, world_size=ranks.world_size(), begins=begins, bare=bare))
    try:
        require_shared_folder(config.run_dir, "run.dir", remedy="Choose another folder.")
        with _watched(config):
            yield folder
    except UserError:
        folder.discard_unused()  # rank 0 alone has opened it
        raise
    finally:
        folder.close()


def _watched(config: Config) -> AbstractContextManager[object]:
    minutes = config.train.hang_minutes
    if minutes is None:
        return nullcontext()
    return Watchdog(config.run_dir, rank=ranks.rank(), world_size=ranks.world_size(), minutes=minutes)


def requests_for(config: Config) -> Requests:
    """This rank's view of what the job is asked, signals included from now on."""
    requests = Requests(config.run_dir, rank=ranks.rank(), max_hours=config.train.max_hours)
    requests.catch_signals()
    return requests


def open_log(config: Config, folder: RunFolder, start: int, total_steps: int, objective: Objective) -> Log:
    """Return the outlets of a start that goes on from step `start`; later rows are cut off."""
    metrics = MetricsFile(folder.metrics)
    again = metrics.truncate_to(start)
    if again:
        say(f"metrics: {again} rows after step {start} are written again")
    folder.note_start_step(start)
    masked = mask_secrets(to_dict(config))
    wandb = masked["tracking"]["wandb"]
    made_of = {name: folder.facts[name] for name in ("run_id", "data", "reference", "versions")}
    wandb_logger = WandbLogger(
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
    loggers = Loggers(wandb_logger, TensorBoardLogger(folder.path, metrics)) if config.tracking.tensorboard else wandb_logger
    loggers.sync()
    facts = RunFacts(total_steps, config.tracking.log_every_steps, objective.start_loss)
    folder.note(training=facts.as_json())
    return Log(folder, metrics, loggers, _open_watch(config, folder, metrics, loggers, facts))


def _open_watch(config: Config, folder: RunFolder, metrics: MetricsFile, loggers: Logger, facts: RunFacts) -> Watch:
    told = [(rule, step) for rule, step in folder.facts.get("health_told", [])]
    new_ones: list[HealthFinding] = []

    def tell(new: list[HealthFinding], found: list[HealthFinding]) -> None:
        new_ones.extend(new)
        told.extend((f.id, f.step) for f in new)
        folder.note(health=[f.as_json() for f in found], health_told=told)
        for finding in new:
            say(finding.text())
            if finding.level == "warning":
                loggers.alert(finding.title, finding.text())

    watch = Watch(metrics, facts, config.health, told, tell)
    watch.look()
    for finding in watch.found:
        if finding.level == "warning" and finding not in new_ones:
            loggers.alert(finding.title, finding.text(), again=True)
    folder.note(health=[f.as_json() for f in watch.found])
    return watch


def finish(config: Config, folder: RunFolder, models: Models, job: loop.Job, answers: OwnAnswers | NotAnswered) -> None:
    """All ranks, the last checkpoint committed: answer, give the engine back, judge, export, and leave DONE.

    A stop that is asked for while the policy answers is obeyed: the next start goes on there.
    """

    def stop_asked() -> bool:
        return job.requests.look().stop

    began = time.perf_counter()
    try:
        policy = answers.answer(job.engine, job.total_steps, stop_asked) if isinstance(answers, OwnAnswers) else None
        _give_back(job)
        row = _judged(job, answers, policy, began, stop_asked) if isinstance(answers, OwnAnswers) and policy else None
    except StopRequested:
        _give_back(job)
        _stop(folder, job)
        return

    def conclude() -> str:
        log = job.log
        assert log is not None
        if isinstance(answers, NotAnswered):
            said, block = not_judged(answers.why), {}
        else:
            assert row is not None
            said, block = verdict(row, config.health, str(config.export_dir)), own_answers.as_run_json(answers, row)
        folder.note(answers={**block, "verdict": said.word, "verdict_text": said.text})
        source = config.run_dir / "checkpoints" / save.folder_name(job.total_steps)
        exported = export_checkpoint(config, models, source, folder, merged=config.export.merged)
        if isinstance(answers, OwnAnswers) and policy is not None:
            log.loggers.samples(answers.samples(policy))
        log.loggers.verdict(said.word, said.text)
        if (metric := config.checkpoint.keep_best) is not None:  # the end's own answers came after its checkpoint
            steps = [int(path.name.removeprefix("step-")) for path in save.committed(source.parent)]
            folder.note(best={"metric": metric, "step": best_step(log.metrics.rows(), metric, steps)})
        summary = _summary(config, log.metrics.rows(), job.total_steps, exported, said.text)
        folder.note(memory=folder.facts["memory"] | {"peak_bytes": peak_memory()})
        folder.done(summary)
        job.requests.obeyed()
        log.loggers.finish()
        return summary

    say(ranks.run_on_rank_zero(conclude))


def _give_back(job: loop.Job) -> None:
    job.answer = None  # it holds the engine too
    if job.engine is not None:
        zero3.release(job.engine)
        job.engine = None


def _stop(folder: RunFolder, job: loop.Job) -> None:
    where = "while the trained model answers"
    if job.log is not None:
        folder.stopped(job.requests.reason(), job.total_steps, where)
        job.requests.obeyed()
        job.log.loggers.finish()
    say(f"stopped on request {where}; start again to go on")


def _judged(
    job: loop.Job, answers: OwnAnswers, policy: PolicyAnswers, began: float, stop_asked: Callable[[], bool]
) -> Row:
    """All ranks: the row of the policy's answers, written where an earlier start has not."""
    step = job.total_steps

    def written() -> Row | None:
        assert job.log is not None
        rows = [row for row in job.log.metrics.rows() if (row["kind"], row["step"]) == ("answers", step)]
        return rows[0] if rows else None

    if ranks.run_on_rank_zero(written) is None:
        metrics = answers.judge(policy, stop_asked)
        seconds = {"perf/answers_seconds": time.perf_counter() - began}
        if job.log is not None:
            job.log.write("answers", step, job.order.step(step - 1), metrics | seconds)
    row: Row | None = ranks.run_on_rank_zero(written)
    assert row is not None
    return row


def _summary(config: Config, rows: list[dict[str, Any]], steps: int, exported: str, verdict: str) -> str:
    lines = [f"done: {steps} steps, {rows[-1]['pairs_seen']} rows seen"]
    for kind in ("train", "eval"):
        of_kind = [r for r in rows if r["kind"] == kind]
        # data.eval may have changed between the starts: names that are in both.
        both = [n for n in of_kind[0] if n in of_kind[-1]] if of_kind else []
        for name in both:
            if name.endswith(("/loss", "/rewards/accuracies", "/rewards/margins")):
                lines.append(f"  {name}: {of_kind[0][name]:.4f} at first, {of_kind[-1][name]:.4f} at last")
    lines += [
        f"  {exported}",
        f"  {verdict}",
        f"  curves: {config.run_dir / 'metrics.jsonl'}; checkpoints, configuration and versions beside it",
    ]
    return "\n".join(lines)


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
        ends=response_end_ids(read_template(models.tokenizer, config.data.template, options)),
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
