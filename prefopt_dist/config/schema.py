"""The whole configuration: one frozen dataclass a section, with the defaults.

The types are the rules: `build.py` reads them, so a bound stands once, beside its field.
Relative paths (model, data, DeepSpeed, run) are relative to the current working directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from prefopt_dist.config.bounds import Bound, Count, Fraction, NotNegative, Positive, Text
from prefopt_dist.config.data import Data, DataSource, Inspect
from prefopt_dist.config.losses import DPOLoss, Loss
from prefopt_dist.config.training import Checkpoint, DeepSpeed, Eval, Export, Lora, Model, Optim, Reference, Train
from prefopt_dist.errors import UserError


@dataclass(frozen=True)
class Health:
    """When a rule speaks; docs/health.md says what each rule looks at. Warnings never stop a run."""

    grace: Fraction = 0.333
    """The share of the steps after which a run that has learnt nothing is no beginner any more."""
    stuck_accuracy: Fraction = 0.6
    """accuracy-stuck: training accuracy that is certainly below this."""
    wrong_margin: Fraction = 0.8
    """noisy-labels: the median size of the margins with the wrong sign, over that of those with the right one."""
    flipped_accuracy: Fraction = 0.35
    """labels-flipped: the reference's log-prob accuracy, summed and per token, below this."""
    chosen_fall: Positive = 0.5
    """chosen-falls: nats a token that the chosen responses have lost since the start."""
    displacement: Positive = 1.25
    """likelihood-displaced: log-probability that the chosen responses have lost, over what the reference gave them."""
    overfit_rise: Positive = 0.1
    """overfit: part by which an evaluation loss lies above its best; half of it three times in a row; or twice it in
    accuracy lost."""
    length_correlation: Fraction = 0.6
    """length-bias: correlation of the margin with how much longer the chosen response is."""
    divergence: Positive = 1.25
    """diverging: the loss over that of the start."""
    gradient_spike: Positive = 10.0
    """gradient-spike: a gradient norm over the median of the rows before."""
    slow_rank: Positive = 1.5
    """slow-rank: a rank's own seconds of work over what its units would take the others (median)."""
    memory_growth: Positive = 0.05
    """memory-creep: part by which memory has grown through four successive stretches, and 64 MiB at least."""
    collapse_excess: Positive = 0.35
    """answers-collapsed: nats a token by which the model's answers are stranger to the reference than 1.25 times the
    stranger of its own answers and the chosen responses; counts together with the next two."""
    collapse_moved: Positive = 0.3
    """answers-collapsed: nats a token by which they are stranger to the reference than to the model itself."""
    collapse_own: Positive = 1.25
    """answers-collapsed: the model's own nats a token on its answers, over the reference's on the start's; where the
    answers loop or no longer end, these count in its place."""
    collapse_loops: Fraction = 0.2
    """answers-collapsed: by how much more of the 4-grams repeat than in the start's answers."""
    longer_answers: Positive = 1.5
    """answers-longer: the mean length of the model's answers over that of the start's."""
    unended_answers: Fraction = 0.2
    """answers-do-not-end: how much smaller the share of answers that end has become than it was at the start."""


@dataclass(frozen=True)
class Run:
    """Where the run lives and what its randomness starts from."""

    dir: Text
    """The run folder; all nodes must see the same one."""
    seed: Annotated[int, Bound("in [0, 2**32)", lambda v: 0 <= v < 2**32)] = 0
    """Seed of the order of the data and of everything drawn."""
    cache: Text | None = None
    """Folder for what runs share; null: $PREFOPT_CACHE, else <parent of run.dir>/.prefopt."""


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "online"
    """offline keeps its files in the run folder; disabled writes none."""
    project: Text = "prefopt"
    """The project."""
    name: Text | None = None
    """The run's display name; null: the name of the run folder."""
    group: Text | None = None
    """The group that the run is shown in."""
    tags: tuple[Text, ...] = ()
    """Tags of the run."""


@dataclass(frozen=True)
class Tracking:
    """Where the metrics go; metrics.jsonl is written always."""

    wandb: Wandb = field(default_factory=Wandb)
    """Weights & Biases."""
    log_every_steps: Count = 1
    """A row is the mean over the pairs of this many steps."""
    tensorboard: bool = False
    """Event files in RUN/tensorboard too; needs the package tensorboard."""


MOST_NEW_TOKENS = 256
"""Of an answer, where answers.max_new_tokens is null."""


@dataclass(frozen=True)
class Answers:
    """What the start and the trained model say to the same prompts, by which `train` ends with a verdict."""

    prompts: tuple[DataSource, ...] | None = None
    """Rows of any form, of each only the prompt; null: those of the first set of data.eval, else of data.train."""
    number: Annotated[int, Bound("at least 0", lambda v: v >= 0)] = 64
    """Prompts that are answered: the first different ones that fit, as many of each source; 0: none, and no verdict."""
    max_new_tokens: Count | None = None
    """Tokens of an answer, its end included; null: what data.max_length leaves a longest prompt, at most 256."""
    temperature: Positive = 1.0
    """Of the sampling; at 1 the KL is the policy's own."""
    every: Count | None = None
    """Answers with every such evaluation of eval.every_steps too, for rewards that are functions; null: none between
    start and end."""


@dataclass(frozen=True)
class Evaluate:
    """The stage that evaluates one model."""

    model: Text | None = None
    """A Hugging Face folder; null: the newest checkpoint of run.dir."""
    prompts: tuple[DataSource, ...] | None = None
    """Prompts that the model answers, for reward, win rate and KL on its own samples; null: none of these."""
    against: Text | None = None
    """The model whose answers it is compared with; null: the reference."""
    samples: Count = 1
    """Answers to a prompt."""
    temperature: Positive = 1.0
    """Of the answers; at 1 the KL is the policy's own, elsewhere that of what it samples there."""


@dataclass(frozen=True)
class RewardSource:
    """One reward of the weighted mean: a function or a model."""

    function: Text | None = None
    """A Python function as module:name, score(prompt, response, row) → a number."""
    model: Text | None = None
    """A sequence-classification folder or hub name with one output and a chat template."""
    weight: Positive = 1.0
    """Its weight in the mean."""

    def __post_init__(self) -> None:
        if (self.function is None) == (self.model is None):
            raise UserError(
                f"generate.rewards: an entry has function {self.function!r} and model {self.model!r}, must have one of "
                "them; write {function: my_module:score} or {model: FOLDER}"
            )


@dataclass(frozen=True)
class Generate:
    """The stage that makes pairs: n responses to each prompt, a reward, and which of them become pairs."""

    rewards: tuple[RewardSource, ...] = ()
    """What scores a response: the weighted mean of these."""
    prompts: tuple[DataSource, ...] | None = None
    """Rows of any form, or with a prompt alone; null: the prompts of data.train."""
    n: Annotated[int, Bound("at least 2, since a pair needs two responses", lambda v: v >= 2)] = 8
    """Responses to each prompt."""
    temperature: Positive = 0.9
    """Logits are divided by it."""
    top_p: Annotated[float, Bound("in (0, 1]", lambda v: 0 < v <= 1)] = 1.0
    """Sampled from the most likely tokens that hold this much probability."""
    max_new_tokens: Count = 256
    """Tokens of a response, its end included; a response that has not ended by then is in no pair."""
    batch_tokens: Count = 32768
    """Tokens (prompts and room for responses) that a rank samples at once; decides memory and speed."""
    pairing: Literal["best_worst", "best_random", "margin"] = "best_worst"
    """Best and worst of a prompt, best and a random lesser one, or every two at least min_margin apart."""
    min_margin: NotNegative = 0.0
    """Pairs whose rewards differ by less are left out; equal rewards always are."""
    on_bad_reward: Literal["stop", "drop"] = "stop"
    """What a reward that raises or is no finite number does: end the job, or leave that response out."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples; vllm is a package of its own and needs GPUs."""
    pairs: Text | None = None
    """The file of pairs; null: RUN/pairs.jsonl."""


@dataclass(frozen=True)
class Rounds:
    """The stage that repeats generate, first pass and train."""

    count: Count = 3
    """Rounds."""
    reference: Literal["start", "first"] = "start"
    """Each round's reference: the model that it starts from, or the very first one (or reference.name_or_path)."""


@dataclass(frozen=True)
class Plan:
    """The stage that says what a job needs: the machine it is planned for."""

    gpu: Literal["h200", "h100", "a100-80", "a100-40", "l40s", "cpu"] | None = None
    """The kind of GPU, or this machine's CPU; null: what this machine has."""
    nodes: Count = 1
    """Machines."""
    gpus_per_node: Count | None = None
    """GPUs (or CPU ranks) of each; null: what is here, 8 of a kind that is named, or 2 CPU ranks."""
    file: Text | None = None
    """Where the plan is written as JSON; null: nowhere."""


@dataclass(frozen=True)
class Report:
    """The stage that makes a page about a run."""

    compare: tuple[Text, ...] = ()
    """Run folders to show side by side instead of run.dir."""
    file: Text | None = None
    """The page to write; null: RUN/report.html, or report.html beside run.dir where runs are compared."""


@dataclass(frozen=True)
class Config:
    """One run's whole configuration, and what its nulls stand for."""

    run: Run
    """Where the run lives."""
    model: Model
    """The policy."""
    data: Data
    """The preference data."""
    reference: Reference = field(default_factory=Reference)
    """The frozen model."""
    lora: Lora | None = None
    """Adapters in place of the whole policy; null: every weight is trained."""
    loss: Loss = field(default_factory=DPOLoss)
    """The loss and its options."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer."""
    train: Train = field(default_factory=Train)
    """How long and in what portions."""
    eval: Eval = field(default_factory=Eval)
    """When to evaluate."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """When to commit."""
    tracking: Tracking = field(default_factory=Tracking)
    """Where the metrics go."""
    answers: Answers = field(default_factory=Answers)
    """The model's own answers, before and after."""
    health: Health = field(default_factory=Health)
    """The thresholds of the health rules."""
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    """DeepSpeed's files."""
    export: Export = field(default_factory=Export)
    """The export stage."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """The evaluate stage."""
    plan: Plan = field(default_factory=Plan)
    """The plan stage."""
    report: Report = field(default_factory=Report)
    """The report stage."""
    generate: Generate = field(default_factory=Generate)
    """The generate stage."""
    rounds: Rounds = field(default_factory=Rounds)
    """The rounds stage."""
    inspect: Inspect = field(default_factory=Inspect)
    """What findings in the data do."""

    def __post_init__(self) -> None:
        if self.answers.max_new_tokens is not None and self.answers.max_new_tokens >= self.data.max_length:
            raise UserError(
                f"answers.max_new_tokens: got {self.answers.max_new_tokens}, must be less than data.max_length "
                f"({self.data.max_length}), so that a prompt fits; lower it or raise data.max_length"
            )
        if self.export.merged and self.lora is None:
            raise UserError(
                "export.merged: got true, but this run has no section lora, so its export is a whole model; remove it"
            )
        for name in ("eval_pairs", "eval_prompts"):
            if self.data.eval is None and self.inspect.policies[name] != "keep":
                raise UserError(
                    f"inspect.{name}: got {self.inspect.policies[name]}, but data.eval is null, so there is nothing to "
                    "compare with; set data.eval, or set this to keep"
                )

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.dir)

    @property
    def cache_dir(self) -> Path:
        """The folder that runs share."""
        if self.run.cache is not None:
            return Path(self.run.cache)
        from_environment = os.environ.get("PREFOPT_CACHE")
        return Path(from_environment) if from_environment else self.run_dir.parent / ".prefopt"

    def with_cache(self) -> Config:
        """The same with the cache named: $PREFOPT_CACHE could be another one on another rank or at another start."""
        return replace(self, run=replace(self.run, cache=str(self.cache_dir)))

    @property
    def reference_store(self) -> Path:
        """The folder of the reference's scores."""
        return self.cache_dir / "reference" if self.reference.store is None else Path(self.reference.store)

    @property
    def reference_micro_batch_tokens(self) -> int:
        """Tokens in a micro-batch of the first pass."""
        return self.reference.micro_batch_tokens or 2 * self.train.micro_batch_tokens

    @property
    def tokenizer(self) -> str:
        """The tokenizer's folder or hub name."""
        return self.model.tokenizer or self.model.name_or_path

    @property
    def pairs_file(self) -> Path:
        """The file of pairs that the generate stage writes."""
        return self.run_dir / "pairs.jsonl" if self.generate.pairs is None else Path(self.generate.pairs)

    @property
    def new_tokens(self) -> int:
        """Tokens that an answer of the section answers may have."""
        room = self.data.max_length - self.data.max_prompt_length
        return self.answers.max_new_tokens or min(MOST_NEW_TOKENS, room)

    @property
    def answers_every_steps(self) -> int | None:
        """Steps between the answers of section answers; None: at start and end alone."""
        if self.answers.every is None or self.eval.every_steps is None or self.answers.number == 0:
            return None
        return self.answers.every * self.eval.every_steps

    @property
    def answered_sources(self) -> tuple[str, tuple[DataSource, ...]]:
        """The dotted key and the sources of the prompts of the section answers."""
        if self.answers.prompts is not None:
            return "answers.prompts", self.answers.prompts
        for name, sources in (self.data.eval or {}).items():
            return f"data.eval.{name}".rstrip("."), sources
        return "data.train", self.data.train

    @property
    def prompt_sources(self) -> tuple[DataSource, ...]:
        """Where the generate stage finds its prompts."""
        return self.data.train if self.generate.prompts is None else self.generate.prompts

    @property
    def export_dir(self) -> Path:
        """The folder that the export stage writes."""
        return self.run_dir / "final" if self.export.dir is None else Path(self.export.dir)
