"""Finish a training: the policy's answers, their verdict, the export and DONE."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prefopt_dist.checkpoint import save
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import StopRequested
from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.monitoring.timers import peak_memory
from prefopt_dist.monitoring.verdict import Verdict, not_judged, verdict
from prefopt_dist.setup import own_answers
from prefopt_dist.setup.export_run import best_checkpoint, export_checkpoint, push_to_hub
from prefopt_dist.setup.own_answers import NotAnswered, OwnAnswers, PolicyAnswers
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.training.job import Job


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
