"""The end of a training: the policy's answers and the verdict on them, the exported model, DONE."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.reference.turn import StoppedInFirstPass
from prefopt_dist.stages import export, own_answers
from prefopt_dist.stages.ingredients import Models
from prefopt_dist.stages.own_answers import NotAnswered, OwnAnswers, PolicyAnswers
from prefopt_dist.tracking.console import say
from prefopt_dist.tracking.metrics_file import Row
from prefopt_dist.tracking.own_work import peak_memory
from prefopt_dist.tracking.verdict import unjudged, verdict
from prefopt_dist.training import checkpoint, loop
from prefopt_dist.training.best import best_step
from prefopt_dist.training.run_folder import RunFolder


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
    except StoppedInFirstPass:
        _give_back(job)
        _stop(folder, job)
        return

    def conclude() -> str:
        log = job.log
        assert log is not None
        if isinstance(answers, NotAnswered):
            said, block = unjudged(answers.why), {}
        else:
            assert row is not None
            said, block = verdict(row, config.health, str(config.export_dir)), own_answers.as_run_json(answers, row)
        folder.note(answers={**block, "verdict": said.word, "verdict_text": said.text})
        source = config.run_dir / "checkpoints" / checkpoint.folder_name(job.total_steps)
        exported = export.export_checkpoint(config, models, source, folder, merged=config.export.merged)
        if isinstance(answers, OwnAnswers) and policy is not None:
            log.feeds.samples(answers.samples(policy))
        log.feeds.verdict(said.word, said.text)
        if (metric := config.checkpoint.keep_best) is not None:  # the end's own answers came after its checkpoint
            steps = [int(path.name.removeprefix("step-")) for path in checkpoint.committed(source.parent)]
            folder.note(best={"metric": metric, "step": best_step(log.metrics.rows(), metric, steps)})
        summary = _summary(config, log.metrics.rows(), job.total_steps, exported, said.text)
        folder.note(memory=folder.facts["memory"] | {"peak_bytes": peak_memory()})
        folder.done(summary)
        job.requests.obeyed()
        log.feeds.finish()
        return summary

    say(ranks.decide(conclude))


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
        job.log.feeds.finish()
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

    if ranks.decide(written) is None:
        metrics = answers.judge(policy, stop_asked)
        seconds = {"perf/answers_seconds": time.perf_counter() - began}
        if job.log is not None:
            job.log.write("answers", step, job.order.step(step - 1), metrics | seconds)
    row: Row | None = ranks.decide(written)
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
