"""Sections of the configuration about training: model, reference, optimizer, loop, checkpoints, adapters, export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prefopt_dist.config.bounds import Bound, Count, Dtype, Fraction, NotNegative, Positive, Text


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, trained in place of the weights: W + s · B A, B = 0 at the start (Hu et al. 2021).

    Their dropout is 0, as that of the reference is.
    """

    r: Count = 16
    """The rank: rows of A and columns of B."""
    alpha: Count = 32
    """α: the product B A counts s = α/r times."""
    rslora: bool = False
    """s = α/√r instead, with which large ranks still learn (Kalajdzievski 2023)."""
    target_modules: tuple[Text, ...] | None = None
    """The linear layers that get one, by name, such as [q_proj, v_proj]; null: all but the output head."""


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
    """Activation checkpointing of no layer or all; auto: of as few layers as the device's free memory asks for."""


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
    spike_factor: Annotated[float, Bound("greater than 1", lambda v: v > 1)] = 10.0
    """How many times the median of the last 64 norms is far above them; the first 16 updates have none to compare."""
    max_skipped_steps: Annotated[int, Bound("at least 0", lambda v: v >= 0)] = 3
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
    keep: Annotated[int, Bound("at least 2", lambda v: v >= 2)] = 2
    """The newest this many stay; two, so that one is whole whatever happens to the other."""
    keep_best: Text | None = None
    """A metric of the evaluations or answers, such as eval/loss or answers/reward: the checkpoint that is best by it
    stays too; null: none."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint; never: refuse a run folder that has one."""


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
