"""What a run can be told: one frozen dataclass a section, with the defaults.

The types are the rules: `build.py` reads them, so a bound stands once, beside its field.
Relative paths (model, data, DeepSpeed, run) are relative to the current working directory.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from prefopt_dist.config.findings import Inspect
from prefopt_dist.config.health import Health
from prefopt_dist.config.lora import Lora
from prefopt_dist.config.losses import DPOLoss, Loss
from prefopt_dist.config.rules import Count, Dtype, Fraction, NotNegative, Positive, Rule, Text
from prefopt_dist.errors import UserError

Day = Annotated[str, Rule("a date as YYYY-MM-DD", lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v) is not None)]


Form = Literal[
    "auto", "raw_pair", "pair", "conversations", "transcripts", "implicit_prompt", "rated", "demonstration",
    "sharegpt", "sharegpt_rated", "sharegpt_kto_tag", "sharegpt_messages", "messages_pair", "swift",
    "swift_messages", "messages_rated", "alpaca_pair", "alpaca_outputs", "alpaca_farm", "alpaca", "ultrafeedback",
    "question_pair", "openai", "nemo", "nectar", "helpsteer2", "helpsteer3", "shp", "saferlhf", "webgpt", "arena",
    "arena_texts",
]  # fmt: skip
"""The forms of data/forms.py, which a test compares."""


@dataclass(frozen=True)
class Run:
    """Where the run lives and what its randomness starts from."""

    dir: Text
    """The run folder; all nodes must see the same one."""
    seed: Annotated[int, Rule("in [0, 2**32)", lambda v: 0 <= v < 2**32)] = 0
    """Seed of the order of the data and of everything drawn."""
    cache: Text | None = None
    """Folder for what runs share; null: $PREFOPT_CACHE, else <parent of run.dir>/.prefopt."""


@dataclass(frozen=True)
class Model:
    """The policy: the weights that training starts from."""

    name_or_path: Text
    """A Hugging Face folder or hub name."""
    tokenizer: Text | None = None
    """A tokenizer's folder or hub name; null: name_or_path."""
    dtype: Dtype = "bfloat16"
    """The dtype of forward and backward; the optimizer's master weights are float32 in any case."""
    checkpointing: Literal["auto", "none", "all"] = "auto"
    """Activation checkpointing: of no layer, of all; auto: of as few layers as the device's free memory asks for."""


@dataclass(frozen=True)
class Reference:
    """The frozen model that the first pass scores, and where its scores are kept."""

    name_or_path: Text | None = None
    """A Hugging Face folder or hub name; null: the policy's own initial weights."""
    store: Text | None = None
    """Folder of the scores; null: <cache>/reference."""
    offload: Literal["none", "cpu"] = "none"
    """Where the reference's parameters rest during the first pass."""
    micro_batch_tokens: Count | None = None
    """Tokens in a micro-batch of the first pass; null: 2 × train.micro_batch_tokens (no backward)."""


@dataclass(frozen=True)
class DataSource:
    """One set of rows."""

    path: Text
    """A file, a saved dataset or a hub name."""
    split: Text | None = None
    """Split of a saved or hub dataset or a folder of files; null: 'train' there; files have none."""
    weight: Positive = 1.0
    """Passes an epoch; 0.5 is a seeded half."""
    name: Text | None = None
    """Configuration of a hub dataset or a folder of files, such as en; null: the only one."""


@dataclass(frozen=True)
class PairsFrom:
    """How a row of several rated answers becomes a pair."""

    responses: Text
    """Dotted path of the list of answers; through a list of objects, as completions.text."""
    scores: Text
    """Dotted path of the list of their scores, such as completions.score."""
    pairing: Literal["best_worst", "best_random"] = "best_worst"
    """The rejected one: that of the lowest score, or one of the lower ones, drawn by the row's content."""
    min_margin: NotNegative = 0.0
    """A row whose two scores differ by less is left out as a tie."""


@dataclass(frozen=True)
class Data:
    """The preference data and how its rows become token sequences."""

    train: tuple[DataSource, ...]
    """A path or hub name, one {path, name, split, weight}, or a list of these."""
    eval: dict[str, tuple[DataSource, ...]] | None = None
    """The same, or a map of named sets; null: no evaluation. The unnamed set has the name ''."""
    format: Form = "auto"
    """The form of the rows; auto: found by the fields of the first rows."""
    template: Literal["auto", "chat", "none"] = "auto"
    """Whether text goes through the chat template; auto: unless the first prompts of its source are rendered turns."""
    template_date: Day = "2024-07-26"
    """YYYY-MM-DD: what a chat template that writes the day's date gets; the day itself would change the tokens."""
    learn: Literal["all", "last"] = "all"
    """Of several assistant turns in a response, or of a conversation in messages, which are scored and learnt."""
    thinking: Literal["empty", "keep"] | None = None
    """Answers where generation's prompt opens reasoning: behind that prompt, the reasoning closed at once; or as the
    template renders the finished conversation; null: as rendered where that begins with the prompt, else empty."""
    system: Literal["keep", "merge", "drop"] = "keep"
    """A system turn that the chat template has no place for: a bad row, put before the first user turn, or left out."""
    chat_template: Text | None = None
    """A file with a Jinja template to use instead of the tokenizer's; the export carries it."""
    template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, such as {enable_thinking: false}; a row's chat_template_kwargs go before them."""
    columns: dict[str, str] | None = None
    """Our names of columns, and the dotted paths of the data's, such as {prompt: input.text, chosen: good}."""
    pairs_from: PairsFrom | None = None
    """Of rows with several rated answers: where they are, and which two are the pair; null: rows are what they are."""
    max_length: Annotated[int, Rule("at least 2", lambda v: v >= 2)] = 1024
    """Tokens of prompt and response together."""
    max_prompt_length: Count = 512
    """Tokens to which the prompt is cut where prompt and response exceed max_length."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """What a row that cannot be used does: end the run with its place, or be dropped and counted."""

    def __post_init__(self) -> None:
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"data.max_prompt_length: got {self.max_prompt_length}, must be less than data.max_length "
                f"({self.max_length}), so that a response fits; lower it or raise data.max_length"
            )


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule."""

    learning_rate: Positive = 5.0e-7
    """The peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The course after the warm-up: to 0 in a line or a half cosine, or level."""
    warmup_ratio: Fraction = 0.1
    """The share of the steps over which the rate rises from 0."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive | None = 1.0
    """The gradient's norm is clipped to this; null: never."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """AdamW's term in the denominator."""


@dataclass(frozen=True)
class EarlyStop:
    """Ends the training where an evaluation has not got better for long; the run is then done."""

    metric: Text = "eval/loss"
    """A metric of the evaluations, or with answers.every of the answers, such as answers/reward; what ends in loss and
    answers/repeated_4grams are better where they are lower, all else where it is higher."""
    evaluations: Count = 3
    """So many in a row without a new best end it."""


@dataclass(frozen=True)
class Train:
    """How long and in what portions."""

    epochs: Count = 1
    """Passes over the data."""
    max_steps: Count | None = None
    """Ends training at this step if the epochs have not; null: the epochs alone decide."""
    global_batch_pairs: Count = 64
    """G: pairs to an optimizer step, however many ranks there are; of KTO the rated responses."""
    micro_batch_tokens: Count = 8192
    """Packed tokens in one forward and backward of one rank; memory and speed, never the result."""
    on_spike: Literal["none", "skip", "stop"] = "none"
    """What an update with a gradient norm far above the last ones does: be made, be left out, end the run."""
    spike_factor: Annotated[float, Rule("greater than 1", lambda v: v > 1)] = 10.0
    """How many times the median of the last 64 norms is far above them; the first 16 updates have none to compare."""
    max_skipped_steps: Annotated[int, Rule("at least 0", lambda v: v >= 0)] = 3
    """Updates in a row that are left out because loss or gradient is not finite or a spike; one more ends the run."""
    early_stop: EarlyStop | None = None
    """{metric, evaluations}: ends the training where an evaluation has not got better; null: never."""
    max_hours: Positive | None = None
    """Stops with a checkpoint after this many hours of one start; null: no limit."""
    hang_minutes: Positive | None = 30.0
    """Ends every stage where no rank has got on for so long; more than the longest load of a model; null: never."""


@dataclass(frozen=True)
class Eval:
    """When the sets of data.eval are evaluated."""

    every_steps: Count | None = 100
    """Every this many steps; null: at start and end only, as the next two say."""
    at_start: bool = True
    """Before the first step (step 0)."""
    at_end: bool = True
    """After the last step."""


@dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are committed and how many stay."""

    every_steps: Count | None = 100
    """Every this many steps; null: at the last step only."""
    keep: Annotated[int, Rule("at least 2", lambda v: v >= 2)] = 2
    """The newest this many stay; two, so that one is whole whatever happens to the other."""
    keep_best: Text | None = None
    """A metric of the evaluations or answers, such as eval/loss or answers/reward: the checkpoint that is best by it
    stays too; null: none."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint; never: refuse a run folder that has one."""


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
    number: Annotated[int, Rule("at least 0", lambda v: v >= 0)] = 64
    """Prompts that are answered: the first different ones that fit, as many of each source; 0: none, and no verdict."""
    max_new_tokens: Count | None = None
    """Tokens of an answer, its end included; null: what data.max_length leaves a longest prompt, at most 256."""
    temperature: Positive = 1.0
    """Of the sampling; at 1 the KL is the policy's own."""
    every: Count | None = None
    """Answers with every such evaluation of eval.every_steps too, for rewards that are functions; null: none between
    start and end."""


@dataclass(frozen=True)
class DeepSpeed:
    """DeepSpeed's own files: ZeRO, communication and offload keys only.

    A file of deepspeed_configs/ that the working folder has not is taken from this package's repository.
    """

    policy: Text = "deepspeed_configs/policy_zero3.json"
    """For the trained model."""
    reference: Text = "deepspeed_configs/reference_zero3.json"
    """For the first pass."""


@dataclass(frozen=True)
class Export:
    """The stage that writes a Hugging Face folder."""

    dir: Text | None = None
    """The folder to write; null: RUN/final."""
    checkpoint: Text | None = None
    """The checkpoint to export; null: the newest; best: the one that is best by checkpoint.keep_best's metric."""
    dtype: Dtype | None = None
    """The dtype of the written weights; null: model.dtype."""
    merged: bool = False
    """Of a run with adapters the whole model with them added in; otherwise the adapters alone."""


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
    n: Annotated[int, Rule("at least 2, since a pair needs two responses", lambda v: v >= 2)] = 8
    """Responses to each prompt."""
    temperature: Positive = 0.9
    """Logits are divided by it."""
    top_p: Annotated[float, Rule("in (0, 1]", lambda v: 0 < v <= 1)] = 1.0
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
