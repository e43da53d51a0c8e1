"""The whole configuration: a frozen dataclass for each section, with the defaults.

The types are the rules: `build.py` checks values by them, so each bound is written once, at its field. The docstrings
under the fields are the text of docs/configuration.md (`python -m prefopt_dist.config.reference_page --write`).
Relative paths (model, data, DeepSpeed, run) are relative to the current working directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from prefopt_dist.config.bounds import Bound, Count, Fraction, Positive, Text
from prefopt_dist.config.data import Data, DataSource, Inspect
from prefopt_dist.config.losses import DPOLoss, Loss, refuse_margin, refuse_weight
from prefopt_dist.config.rollouts import Generate, Rounds
from prefopt_dist.config.training import Checkpoint, DeepSpeed, Eval, Export, Lora, Model, Optim, Reference, Train
from prefopt_dist.errors import UserError


@dataclass(frozen=True)
class Health:
    """The thresholds of the health rules, which docs/health.md explains. A finding never stops a run."""

    grace: Fraction = 0.333
    """Share of the steps after which a run should have begun to learn; several rules apply only after it."""
    stuck_accuracy: Fraction = 0.6
    """`accuracy-stuck`: the training accuracy is below this by more than a standard error."""
    wrong_margin: Fraction = 0.8
    """`noisy-labels`: the median size of the margins with the wrong sign, divided by that of the others, is at least
    this."""
    flipped_accuracy: Fraction = 0.35
    """`labels-flipped`: the accuracy of the reference's log-probs, both summed and per token, is below this."""
    chosen_fall: Positive = 0.5
    """`chosen-falls`: the log-prob of the chosen responses has fallen by more than this since the start, in nats per
    token."""
    displacement: Positive = 1.25
    """`likelihood-displaced`: the fall of the log-prob of the chosen responses, divided by the size of their log-prob
    under the reference, exceeds this."""
    overfit_rise: Positive = 0.1
    """`overfit`: an evaluation loss exceeds its best value by this share of it; or by half this share in three
    evaluations in a row; or an evaluation accuracy is below its best by twice this value."""
    length_correlation: Fraction = 0.6
    """`length-bias`: the correlation of the margin with the difference in length, chosen minus rejected, exceeds
    this."""
    divergence: Positive = 1.25
    """`diverging`: the loss, divided by the loss at the start, exceeds this."""
    gradient_spike: Positive = 10.0
    """`gradient-spike`: the gradient norm, divided by the median of the previous rows, exceeds this."""
    slow_rank: Positive = 1.5
    """`slow-rank`: the time of a rank's own work, divided by the time that the other ranks (median) would need for it,
    exceeds this."""
    memory_growth: Positive = 0.05
    """`memory-creep`: memory has grown by more than this share over four successive stretches of rows, and by at least
    64 MiB."""
    collapse_excess: Positive = 0.35
    """`answers-collapsed`: −log π_ref per token of the model's answers exceeds, by more than this, 1.25 times the
    larger of its values for the start's answers and for the chosen responses (in nats). The finding needs this,
    `collapse_moved` and `collapse_own` together."""
    collapse_moved: Positive = 0.3
    """`answers-collapsed`: −log π_ref per token of the model's answers exceeds −log π of the model itself by more than
    this (in nats)."""
    collapse_own: Positive = 1.25
    """`answers-collapsed`: −log π per token of the model's answers, divided by −log π_ref of the start's answers,
    exceeds this. Repeated 4-grams (`collapse_loops`) or answers that do not end (`unended_answers`) count instead of
    it."""
    collapse_loops: Fraction = 0.2
    """`answers-collapsed`: the share of repeated 4-grams exceeds that of the start's answers by more than this."""
    longer_answers: Positive = 1.5
    """`answers-longer`: the mean length of the model's answers, divided by that of the start's, exceeds this."""
    unended_answers: Fraction = 0.2
    """`answers-do-not-end`: the share of answers that end has fallen by more than this since the start."""


@dataclass(frozen=True)
class Run:
    """The run folder, the cache and the seed."""

    dir: Text
    """The run folder; it must be the same shared folder on all nodes."""
    seed: Annotated[int, Bound("in [0, 2**32)", lambda v: 0 <= v < 2**32)] = 0
    """Seed of the order of the data and of all random draws."""
    cache: Text | None = None
    """The cache, a folder that runs share; null: `$PREFOPT_CACHE`, else `.prefopt` next to the run folder."""


@dataclass(frozen=True)
class Wandb:
    """Tracking with Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "online"
    """`online`: send to the server; `offline`: only write files to the run folder; `disabled`: neither."""
    project: Text = "prefopt"
    """Name of the project."""
    name: Text | None = None
    """Display name of the run; null: the name of the run folder."""
    group: Text | None = None
    """Group in which the run is shown; null: none."""
    tags: tuple[Text, ...] = ()
    """Tags of the run."""


@dataclass(frozen=True)
class Tracking:
    """Where metrics are written, besides `metrics.jsonl` in the run folder, which is always written."""

    wandb: Wandb = field(default_factory=Wandb)
    """Tracking with Weights & Biases."""
    log_every_steps: Count = 1
    """Steps between rows of metrics; a row is the mean over the pairs of these steps."""
    tensorboard: bool = False
    """Whether to write event files to `tensorboard` in the run folder; needs the package tensorboard."""


DEFAULT_MAX_NEW_TOKENS = 256
"""Largest number of tokens of an answer if answers.max_new_tokens is null."""


@dataclass(frozen=True)
class Answers:
    """Answers of the start and of the trained model to the same prompts, from which `train` draws its verdict.

    docs/answers.md explains them.
    """

    prompts: tuple[DataSource, ...] | None = None
    """Rows of any form, of which only the prompts are used; null: those of the first set of `data.eval`, else those of
    `data.train`."""
    number: Annotated[int, Bound("at least 0", lambda v: v >= 0)] = 64
    """Number of prompts: the first different ones that fit, equally many from each source. 0: no answers and no
    verdict."""
    max_new_tokens: Count | None = None
    """Largest number of tokens of an answer, including its end token; less than `data.max_length`; null:
    `data.max_length` − `data.max_prompt_length`, at most 256."""
    temperature: Positive = 1.0
    """Sampling temperature; the KL is that of the policy only at 1."""
    every: Count | None = None
    """Also answer the prompts at every n-th evaluation of `eval.every_steps`, for this n; all rewards must then be
    functions. null: only at the start and the end."""


@dataclass(frozen=True)
class Evaluate:
    """The stage `evaluate`, which evaluates one model."""

    model: Text | None = None
    """A Hugging Face folder or a hub name; null: the newest checkpoint of the run folder."""
    prompts: tuple[DataSource, ...] | None = None
    """Prompts that the model answers, for its reward, win rate and KL; null: the model answers no prompts."""
    against: Text | None = None
    """Model whose answers are the comparison: a Hugging Face folder or a hub name; null: the reference."""
    samples: Count = 1
    """Number of answers to each prompt."""
    temperature: Positive = 1.0
    """Sampling temperature; the KL is that of the policy at 1, and that of the tempered distribution otherwise."""


@dataclass(frozen=True)
class Plan:
    """The machine for which the stage `plan` calculates what a job needs (docs/planning.md)."""

    gpu: Literal["h200", "h100", "a100-80", "a100-40", "l40s", "cpu"] | None = None
    """Kind of GPU, or `cpu` for this machine's CPU; null: what this machine has."""
    nodes: Count = 1
    """Number of machines."""
    gpus_per_node: Count | None = None
    """GPUs (or CPU ranks) of each machine; null: those of this machine, 8 if `plan.gpu` names a kind, or 2 CPU
    ranks."""
    file: Text | None = None
    """File for the plan as JSON; null: no file."""


@dataclass(frozen=True)
class Report:
    """The stage `report`, which makes a page about a run (docs/health.md)."""

    compare: tuple[Text, ...] = ()
    """Run folders to show side by side, instead of `run.dir`."""
    file: Text | None = None
    """File for the page; null: `report.html` in the run folder, or next to the run folder if runs are compared."""


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run; its properties resolve the nulls."""

    run: Run
    """The run folder, the cache and the seed."""
    model: Model
    """The model that is trained."""
    data: Data
    """The data, and how its rows become token sequences."""
    reference: Reference = field(default_factory=Reference)
    """The frozen reference model and the store of its scores."""
    lora: Lora | None = None
    """Low-rank adapters; null: every weight of the model is trained."""
    loss: Loss = field(default_factory=DPOLoss)
    """The loss and its options."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer and the learning rate."""
    train: Train = field(default_factory=Train)
    """The training loop: its length, its batches and when it stops."""
    eval: Eval = field(default_factory=Eval)
    """When to evaluate during training."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """When to commit checkpoints, and which to keep."""
    tracking: Tracking = field(default_factory=Tracking)
    """Where metrics are written."""
    answers: Answers = field(default_factory=Answers)
    """The model's own answers before and after training."""
    health: Health = field(default_factory=Health)
    """The thresholds of the health rules."""
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    """DeepSpeed's JSON files."""
    export: Export = field(default_factory=Export)
    """The exported Hugging Face folder."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """The stage `evaluate`."""
    plan: Plan = field(default_factory=Plan)
    """The stage `plan`."""
    report: Report = field(default_factory=Report)
    """The stage `report`."""
    generate: Generate = field(default_factory=Generate)
    """The stage `generate`, and the rewards."""
    rounds: Rounds = field(default_factory=Rounds)
    """The stage `rounds`."""
    inspect: Inspect = field(default_factory=Inspect)
    """Policies for findings in the data, and the stage `inspect`."""

    def __post_init__(self) -> None:
        if self.answers.max_new_tokens is not None and self.answers.max_new_tokens >= self.data.max_length:
            raise UserError(
                f"answers.max_new_tokens: got {self.answers.max_new_tokens}, must be less than data.max_length "
                f"({self.data.max_length}), so that a prompt fits; lower it or raise data.max_length"
            )
        if self.data.weight is not None:
            refuse_weight(self.loss, self.data.weight)
        if self.data.margin is not None:
            refuse_margin(self.loss, self.data.margin)
        if self.export.merged and self.lora is None:
            raise UserError(
                "export.merged: got true, but this run has no section lora, so its export is the whole model; remove it"
            )
        for name in ("eval_pairs", "eval_prompts"):
            if self.data.eval is None and self.inspect.policies[name] != "keep":
                raise UserError(
                    f"inspect.{name}: got {self.inspect.policies[name]}, but data.eval is null, so there is nothing to "
                    "compare with; set data.eval, or set this to keep"
                )

    @property
    def run_dir(self) -> Path:
        """Return the run folder."""
        return Path(self.run.dir)

    @property
    def cache_dir(self) -> Path:
        """Return the folder that runs share."""
        if self.run.cache is not None:
            return Path(self.run.cache)
        from_environment = os.environ.get("PREFOPT_CACHE")
        return Path(from_environment) if from_environment else self.run_dir.parent / ".prefopt"

    def without_judges(self) -> Config:
        """Return a copy without the rewards that compare answers of one model: they cannot compare two models."""
        rewards = tuple(reward for reward in self.generate.rewards if reward.judge is None)
        return replace(self, generate=replace(self.generate, rewards=rewards))

    def with_cache(self) -> Config:
        """Return a copy with the cache set, since $PREFOPT_CACHE may differ on another rank or at another start."""
        return replace(self, run=replace(self.run, cache=str(self.cache_dir)))

    @property
    def reference_store(self) -> Path:
        """Return the folder of the reference's scores."""
        return self.cache_dir / "reference" if self.reference.store is None else Path(self.reference.store)

    @property
    def reference_micro_batch_tokens(self) -> int:
        """Return the number of tokens in a micro-batch of the first pass."""
        return self.reference.micro_batch_tokens or 2 * self.train.micro_batch_tokens

    @property
    def row_tokens(self) -> int:
        """Return the most tokens of a packed row of training, on all ranks that share it."""
        return self.train.sequence_parallel * self.train.micro_batch_tokens

    @property
    def reference_row_tokens(self) -> int:
        """Return the most tokens of a packed row of the first pass, on all ranks that share it."""
        return self.train.sequence_parallel * self.reference_micro_batch_tokens

    @property
    def tokenizer(self) -> str:
        """Return the tokenizer's folder or hub name."""
        return self.model.tokenizer or self.model.name_or_path

    @property
    def pairs_file(self) -> Path:
        """Return the file of pairs that the stage generate writes."""
        return self.run_dir / "pairs.jsonl" if self.generate.pairs is None else Path(self.generate.pairs)

    @property
    def max_answer_tokens(self) -> int:
        """Return the largest number of tokens of an answer of the section answers."""
        left = self.data.max_length - self.data.max_prompt_length
        return self.answers.max_new_tokens or min(DEFAULT_MAX_NEW_TOKENS, left)

    @property
    def answers_every_steps(self) -> int | None:
        """Return the steps between the answers of the section answers; None: only at the start and the end."""
        if self.answers.every is None or self.eval.every_steps is None or self.answers.number == 0:
            return None
        return self.answers.every * self.eval.every_steps

    @property
    def answered_sources(self) -> tuple[str, tuple[DataSource, ...]]:
        """Return the dotted key and the sources of the prompts of the section answers."""
        if self.answers.prompts is not None:
            return "answers.prompts", self.answers.prompts
        for name, sources in (self.data.eval or {}).items():
            return f"data.eval.{name}".rstrip("."), sources
        return "data.train", self.data.train

    @property
    def prompt_sources(self) -> tuple[DataSource, ...]:
        """Return the sources of the prompts of the stage generate."""
        return self.data.train if self.generate.prompts is None else self.generate.prompts

    @property
    def export_dir(self) -> Path:
        """Return the folder that the export writes."""
        return self.run_dir / "final" if self.export.dir is None else Path(self.export.dir)
