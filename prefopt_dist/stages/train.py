"""`train`: the whole job. First pass where rows are missing, training, checkpoints, export; resumes by itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from prefopt_dist.config import Config, mask_secrets, to_dict
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.layout import FROZEN, TRAINING
from prefopt_dist.data.order import Order
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.model.activations import activation_memory
from prefopt_dist.model.adapter import attach
from prefopt_dist.model.cost import forward_cost
from prefopt_dist.model.digests import refuse_if_changed
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.rounding import Rounding
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import Objective
from prefopt_dist.planning.machine import device_peak
from prefopt_dist.reference.turn import StoppedInFirstPass
from prefopt_dist.stages import export, ingredients
from prefopt_dist.stages.base import base_weights
from prefopt_dist.stages.ingredients import Models
from prefopt_dist.stages.job import requests_for, run_folder
from prefopt_dist.stages.losses import described
from prefopt_dist.stages.samples import write_samples
from prefopt_dist.tracking.console import in_units, say
from prefopt_dist.tracking.feed import Feed, Feeds
from prefopt_dist.tracking.health import Finding, RunFacts, Watch
from prefopt_dist.tracking.metrics_file import MetricsFile
from prefopt_dist.tracking.own_work import peak_memory
from prefopt_dist.tracking.tensorboard_feed import TensorBoardFeed
from prefopt_dist.tracking.wandb_feed import WandbFeed
from prefopt_dist.training import checkpoint, loop, room
from prefopt_dist.training.best import best_step
from prefopt_dist.training.manifest import Manifest
from prefopt_dist.training.optimizer import adamw
from prefopt_dist.training.run_folder import RunFolder
from prefopt_dist.training.stopping import Requests


def run(config: Config, asked: Requests | None = None) -> None:
    """All ranks. asked: what the rounds are asked that this run is a part of; None: this run's own."""
    with run_folder(config, begins=True) as folder:
        finished = ranks.decide(folder.summary)
        if finished is not None:
            say(f"{config.run_dir} is done:\n{finished}")
            return
        requests = asked or requests_for(config)
        models = ingredients.load_models(config)
        objective = ingredients.make_objective(config.loss, models.dtype)
        train = ingredients.load_train(config, models, objective)
        evals = ingredients.load_evals(config, models, objective)
        order, total_steps = _plan_steps(config, train)
        reference = ingredients.reference_weights(config, models, objective)
        facts = {"reference_key": reference and reference.key, "data_digest": train.report.digest}
        base = base_weights(config, models)
        if base is not None:
            facts["base_key"] = base.key
        root = config.run_dir / "checkpoints"
        found = checkpoint.find(root)
        _check_resume(config, found, facts)  # before the first pass, which may take hours
        try:
            (scored, *others), first_pass = ingredients.score_reference(
                config, models, objective, [train, *evals.values()], reference, lambda: requests.look().stop
            )
        except StoppedInFirstPass:
            if ranks.rank() == 0:
                folder.stopped(requests.reason(), None)
                requests.obeyed()
            say("stopped on request in the first pass; start again to go on")
            return
        if ranks.rank() == 0:
            folder.note(
                data=ingredients.data_facts(train, evals),
                reference=None if first_pass is None else first_pass.as_run_json(),
            )

        engine, here = _policy(config, models)
        if base is not None:
            ranks.together(partial(refuse_if_changed, base.states))
        if ranks.rank() == 0:
            folder.note(memory=here.as_run_json())
        state: dict[str, Any] | None = None
        start = 0
        if found is not None:
            loaded = checkpoint.load(engine, root, found)
            start, state = loaded.step, loaded.state
            # A kill right after a commit leaves one too many; after the last commit nobody else would remove it.
            ranks.decide(lambda: checkpoint.prune(root, config.checkpoint.keep, best_checkpoint(config)))
            say(f"resuming from {checkpoint.folder_name(start)}")
        job = loop.Job(
            config=config,
            engine=engine,
            objective=objective,
            rounding=Rounding.of(models.policy.config, models.dtype),
            train=scored,
            eval_sets=dict(zip(evals, others, strict=True)),
            order=order,
            total_steps=total_steps,
            requests=requests,
            cost=forward_cost(models.policy.config),
            passes=TRAINING if models.adapter is None else FROZEN,
            peak=device_peak(),
            gated=objective.needs_reference and models.reference_is_start,
            facts=facts,
            log=_open_log(config, folder, start, total_steps, objective) if ranks.rank() == 0 else None,
        )
        say(_what_comes(config, order, start, total_steps))
        stopped_at = loop.train(job, start, state)
        del engine
        _finish(config, folder, models, job, stopped_at)


def _plan_steps(config: Config, rows: TokenisedRows) -> tuple[Order, int]:
    order = Order.of_run(rows.source, rows.weights, config.run.seed, config.train.global_batch_pairs)
    return order, order.total_steps(config.train.epochs, config.train.max_steps)


def _check_resume(config: Config, found: Manifest | None, facts: dict[str, Any]) -> None:
    if found is None:
        return
    if config.checkpoint.resume == "never":
        raise AgreedUserError(
            f"checkpoint.resume: never, but {config.run_dir} has a checkpoint of step {found.step}. "
            "Choose another run.dir, or set checkpoint.resume=auto."
        )
    for name, key, what in (
        ("reference_key", "reference", "the weights or the configuration of the model folder"),
        ("data_digest", "data.train", "the data files, the tokenizer or (for inspect.eval_…=drop) data.eval"),
        ("base_key", "model.name_or_path", "the weights or the configuration of the base model's folder"),
    ):
        if name in facts and found.facts[name] != facts[name]:
            raise AgreedUserError(
                f"{key}: this run began with {name} {found.facts[name]}, and {what} now give {facts[name]}. "
                "Put them back as they were, or start a new run."
            )


def best_checkpoint(config: Config) -> checkpoint.Best:
    """Rank 0: which checkpoint the evaluations so far call the best."""
    metric = config.checkpoint.keep_best
    if metric is None:
        return checkpoint.no_best
    rows = MetricsFile(RunFolder(config.run_dir).metrics).rows()
    return lambda steps: best_step(rows, metric, steps)


def _policy(config: Config, models: Models) -> tuple[Any, room.Room]:
    """The engine, and what activations may take beside it."""
    zero = ranks.together(lambda: ingredients.zero_settings(config.deepspeed.policy, "deepspeed.policy"))
    settings = zero3.policy_settings(
        ingredients.sized(zero, models.policy.config, models.adapter),
        dtype=models.dtype,
        max_grad_norm=config.optim.max_grad_norm,
    )
    torch.manual_seed(config.run.seed)
    lm = load_sharded(models.policy, dtype=models.dtype, settings=settings)
    if models.adapter is not None:
        torch.manual_seed(config.run.seed)  # whatever loading has drawn: the same on any number of ranks
        attach(lm, models.adapter)
    scorer = Scorer(lm).train()
    optim = config.optim
    optimizer = adamw(
        scorer,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
    )
    engine = zero3.policy_engine(scorer, optimizer, settings)
    held, whole = zero3.shard_bytes(scorer)
    say(f"policy: each rank holds {in_units(held)} of {in_units(whole)} of parameters")
    if models.adapter is not None:
        say(f"lora: {zero3.trained_parameters(scorer):,} parameters are trained, the others are frozen")
    here = room.choose(
        activation_memory(models.policy.config, models.dtype, models.adapter),
        wish=config.model.checkpointing,
        tokens=config.train.micro_batch_tokens,
        available=room.available_bytes(lm, settings["zero_optimization"]),
    )
    room.apply(lm, here.checkpointed)
    say(here.text())
    return engine, here


def _open_log(config: Config, folder: RunFolder, start: int, total_steps: int, objective: Objective) -> loop.Log:
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
    return loop.Log(folder, metrics, feeds, _open_watch(config, folder, metrics, feeds, facts))


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


def _finish(config: Config, folder: RunFolder, models: Models, job: loop.Job, stopped_at: int | None) -> None:
    """Gives the engine back, then leaves word: STOPPED, or the exported model and DONE."""
    zero3.release(job.engine)
    job.engine = None
    if stopped_at is not None:
        if job.log is not None:
            folder.stopped(job.requests.reason(), stopped_at)
            job.requests.obeyed()
            job.log.feeds.finish()  # last: a W&B that hangs must not hold the word back
        say(f"stopped after step {stopped_at} of {job.total_steps}; start again to go on")
        return

    def conclude() -> str:
        assert job.log is not None
        source = config.run_dir / "checkpoints" / checkpoint.folder_name(job.total_steps)
        text = export.export_checkpoint(config, models, source, folder, merged=config.export.merged)
        summary = _summary(config, job.log.metrics.rows(), job.total_steps, text)
        if config.tracking.samples:
            rows = next(iter(job.eval_sets.values()), job.train).rows
            job.log.feeds.samples(write_samples(config, models, rows))
        folder.note(memory=folder.facts["memory"] | {"peak_bytes": peak_memory()})
        folder.done(summary)
        job.requests.obeyed()
        job.log.feeds.finish()
        return summary

    say(ranks.decide(conclude))


def _what_comes(config: Config, order: Order, start: int, total: int) -> str:
    per_step, epochs = config.train.global_batch_pairs, config.train.epochs
    times = [("checkpoint", config.checkpoint.every_steps)]
    if config.data.eval:
        times.insert(0, ("evaluation", config.eval.every_steps))
    every = [f"{what} every {steps} steps" if steps else f"{what} at the end" for what, steps in times]
    return (
        f"training: {described(config.loss)}, steps {start + 1} to {total} of {per_step} rows "
        f"({order.rows_per_epoch} an epoch, {epochs} {'epoch' if epochs == 1 else 'epochs'}) "
        f"on {ranks.world_size()} ranks; {'; '.join(every)}"
    )


def _summary(config: Config, rows: list[dict[str, Any]], steps: int, exported: str) -> str:
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
        f"  curves: {config.run_dir / 'metrics.jsonl'}; checkpoints, configuration and versions beside it",
    ]
    return "\n".join(lines)
