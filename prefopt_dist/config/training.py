"""Sections of the configuration about training: model, reference, optimizer, loop, checkpoints, adapters, export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prefopt_dist.config.bounds import Bound, Count, Dtype, Fraction, NotNegative, Positive, Text


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, trained instead of the weights: W + s · B A with B = 0 at the start (Hu et al. 2021).

    They have no dropout. docs/lora.md describes such runs.
    """

    r: Count = 16
    """Rank of the adapters: rows of A and columns of B."""
    alpha: Count = 32
    """α: the scale of the product B A is s = α/r."""
    rslora: bool = False
    """Whether the scale is s = α/√r instead, which suits large ranks (Kalajdzievski 2023)."""
    target_modules: tuple[Text, ...] | None = None
    """Names of the linear layers with an adapter, such as `[q_proj, v_proj]`; null: all but the output head, or with
    `from` those of its adapter."""
    base: Literal["full", "nf4"] = "full"
    """The weights of the frozen linear layers: as they are, or in 4 bit by bitsandbytes (QLoRA)."""
    experts: bool = False
    """Whether the experts of a mixture get adapters too, one for each expert's matrices."""
    dora: bool = False
    """Whether the direction alone is low-rank, with a trained length of each row of the weight (DoRA, Liu 2024)."""
    modules_to_save: tuple[Text, ...] = ()
    """Names of modules of the decoder that are trained whole beside the adapters, such as `[embed_tokens]` after an SFT
    with new tokens."""
    from_: Text | None = None
    """A folder of peft, or its hub name, with an adapter of this base, rank and scale: training goes on from it, and
    the reference is the base model with it. null: the adapters begin at 0."""


@dataclass(frozen=True)
class Model:
    """The policy: the model that is trained."""

    name_or_path: Text
    """The model that training starts from: a Hugging Face folder or a hub name."""
    tokenizer: Text | None = None
    """Folder or hub name of the tokenizer; null: `model.name_or_path`."""
    dtype: Dtype = "bfloat16"
    """Dtype of forward and backward; the optimizer's master weights are always float32."""
    checkpointing: Literal["auto", "none", "all"] = "auto"
    """Activation checkpointing of no layer (`none`) or all layers (`all`); `auto`: of as few layers as fit the free
    memory of the device."""
    path: Literal["auto", "shared", "packed", "plain", "alone"] = "auto"
    """How a micro-batch is computed: each distinct token once in one packed row (`shared`), each sequence in one packed
    row (`packed`), padded rows with transformers' own attention (`plain`), or one sequence a forward pass (`alone`).
    `auto`: the first of them whose log-probs and gradients are proven to be the model's own; another value is proven
    too (docs/models.md)."""
    compile: Literal["auto", "none", "layers", "liger"] = "auto"
    """Fusion of the small operations of a layer in training: none (`none`), by torch.compile, layer by layer
    (`layers`), or by Liger's kernels on a GPU (`liger`; not run on a GPU). `auto`: `layers` on a CPU in a run that is
    long enough to gain more than the compilation takes, else `none` (docs/performance.md)."""


@dataclass(frozen=True)
class Reference:
    """The frozen reference model, and the store of its scores.

    The first pass scores the data with it before training.
    """

    name_or_path: Text | None = None
    """A Hugging Face folder or a hub name; null: `model.name_or_path`, the initial weights of the policy."""
    store: Text | None = None
    """Folder of the stored scores; null: the folder `reference` in the cache (`run.cache`)."""
    offload: Literal["none", "cpu"] = "none"
    """Where the reference's parameters are kept during the first pass: on the device (`none`) or in CPU memory."""
    micro_batch_tokens: Count | None = None
    """Tokens in a micro-batch of the first pass; null: 2 × `train.micro_batch_tokens`, since it has no backward."""
    update_every_steps: Count | None = None
    """The policy becomes the reference after every so many steps (TR-DPO's hard update); null: it never moves."""


@dataclass(frozen=True)
class Optim:
    """The optimizer AdamW and its learning-rate schedule."""

    learning_rate: Positive = 5.0e-7
    """Peak learning rate, after the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up: falls to 0 in a straight line or a half cosine, or stays constant."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps during which the learning rate rises from 0 to its peak."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive | None = 1.0
    """Norm to which the gradient is clipped; null: no clipping."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: Positive = 1e-8
    """Term added to the denominator of the update."""


@dataclass(frozen=True)
class EarlyStop:
    """When training ends because the evaluations no longer improve; the run is then done."""

    metric: Text = "eval/loss"
    """A metric of the evaluations, or (with `answers.every`) of the answers, such as `answers/reward`. Lower is better
    for names that end in `loss` and for `answers/repeated_4grams`, higher for all others."""
    evaluations: Count = 3
    """Training ends after this many evaluations in a row without a new best value."""


@dataclass(frozen=True)
class Train:
    """The training loop: its length, its batches and when it stops."""

    epochs: Count = 1
    """Passes over the data."""
    max_steps: Count | None = None
    """Largest number of optimizer steps; null: no limit besides `train.epochs`."""
    global_batch_pairs: Count = 64
    """G: pairs in an optimizer step over all ranks; with `kto`, rated responses."""
    micro_batch_tokens: Count = 8192
    """Packed tokens in one forward and backward pass of one rank. It changes memory and speed, and the
    result within rounding alone."""
    sequence_parallel: Count = 1
    """S: ranks that share each packed row, for pairs that are too long for one; a row then has up to S times
    `train.micro_batch_tokens` (in the first pass S times `reference.micro_batch_tokens`). It divides the number of
    ranks and the attention heads of each layer (docs/long-pairs.md)."""
    deterministic: bool = False
    """Whether a GPU computes with deterministic algorithms alone, which are slower. Then a resumed run ends with the
    same bits on equal GPUs, versions and numbers of ranks (not run on a GPU). On the CPU it always does."""
    router_aux_loss_coef: Annotated[float, Bound("at least 0", lambda v: v >= 0)] = 0.0
    """For a mixture of experts: coefficient of the loss that balances the experts' loads, per sequence as in
    DeepSeek-V3; 0: none (docs/experts.md)."""
    on_spike: Literal["none", "skip", "stop"] = "none"
    """An update whose gradient norm is far above the previous ones is made (`none`), is skipped (`skip`), or ends the
    run (`stop`)."""
    spike_factor: Annotated[float, Bound("greater than 1", lambda v: v > 1)] = 10.0
    """A gradient norm above this many times the median of the last 64 norms is a spike; the first 16 updates are not
    judged."""
    max_skipped_steps: Annotated[int, Bound("at least 0", lambda v: v >= 0)] = 3
    """Largest number of updates in a row that may be skipped because the loss or gradient is not finite or the norm is
    a spike; one more ends the run."""
    early_stop: EarlyStop | None = None
    """Early stopping, as `{metric: NAME, evaluations: NUMBER}`; null: training does not stop early."""
    max_hours: Positive | None = None
    """Hours after which a start stops with a checkpoint; the same command then resumes the run; null: no limit."""
    hang_minutes: Positive | None = 30.0
    """Minutes without progress on any rank after which the job ends, in every stage. Must exceed the longest time to
    load a model; null: no limit."""


@dataclass(frozen=True)
class Eval:
    """When the sets of `data.eval` are evaluated during training."""

    every_steps: Count | None = 100
    """Steps between evaluations; null: only as the next two keys say."""
    at_start: bool = True
    """Whether to evaluate before the first step (as step 0)."""
    at_end: bool = True
    """Whether to evaluate after the last step."""


@dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are committed and which of them are kept."""

    every_steps: Count | None = 100
    """Steps between checkpoints; null: only at the last step."""
    keep: Annotated[int, Bound("at least 2", lambda v: v >= 2)] = 2
    """Number of newest checkpoints to keep. At least two, so that one is intact if the other is damaged."""
    keep_best: Text | None = None
    """A metric of the evaluations or answers, such as `eval/loss` or `answers/reward`: the best checkpoint by it is
    kept too; null: only the newest are kept."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: continue from the newest checkpoint; `never`: refuse a run folder that has a checkpoint."""


@dataclass(frozen=True)
class DeepSpeed:
    """DeepSpeed's JSON files, with ZeRO, communication and offload keys only.

    A path in `deepspeed_configs/` that does not exist in the working folder is taken from this package's repository.
    """

    policy: Text = "deepspeed_configs/policy_zero3.json"
    """File for training."""
    reference: Text = "deepspeed_configs/reference_zero3.json"
    """File for the first pass."""


@dataclass(frozen=True)
class Export:
    """The stage `export` and the export at the end of `train`, which write a Hugging Face folder.

    At its end `train` exports the checkpoint of its last step. `dir`, `dtype` and `merged` hold for both.
    """

    dir: Text | None = None
    """Folder to write; null: `final` in the run folder."""
    checkpoint: Text | None = None
    """Checkpoint that the stage `export` takes; null: the newest; `best`: the best by the metric
    `checkpoint.keep_best`."""
    dtype: Dtype | None = None
    """Dtype of the written weights; null: `model.dtype`."""
    merged: bool = False
    """Whether a run with adapters exports the whole model with the adapters merged in, instead of the adapters
    alone."""
    push_to_hub: Text | None = None
    """Repository on the hub, as `OWNER/NAME` or `NAME`, to which the folder is pushed at the end, private where it does
    not exist yet; a failure costs nothing but a message. null: it is not pushed."""
