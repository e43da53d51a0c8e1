"""The rules: pure functions of the history, each from a window of rows to the evidence, or None.

docs/health.md has the table of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health import answers, learning, machine
from prefopt_dist.monitoring.health.history import History, Level


@dataclass(frozen=True)
class Rule:
    """A rule and its words."""

    id: str
    level: Level
    title: str
    remedy: str
    look: Callable[[History, Health], str | None]
    """The evidence as it is after the last row; None where there is none"""
    measured: bool = False
    """It judges one measurement, not a window that rows enter and leave: a row without its evidence is a recovery."""


RULES: tuple[Rule, ...] = (
    Rule(
        "labels-flipped",
        "warning",
        "The model that the run starts from prefers the rejected responses",
        "Look whether chosen and rejected are swapped in data.train: run `inspect` and read some pairs",
        learning.labels_flipped,
    ),
    Rule(
        "accuracy-stuck",
        "warning",
        "Training accuracy is stuck near chance",
        "The labels may be ambiguous or random (run `inspect`, read some pairs); else raise optim.learning_rate or "
        "change loss.beta",
        learning.accuracy_stuck,
    ),
    Rule(
        "noisy-labels",
        "warning",
        "A part of the training labels contradicts what the model has learnt from the others",
        "Run `inspect` and read pairs with a negative margin; train fewer epochs, or take loss.name=robust or "
        "loss.label_smoothing, which expect wrong labels",
        learning.noisy_labels,
    ),
    Rule(
        "no-learning",
        "warning",
        "The policy has not moved from its start",
        "Raise optim.learning_rate; look at train/learning_rate, train/grad_norm and train/skipped_steps",
        learning.no_learning,
    ),
    Rule(
        "diverging",
        "warning",
        "The loss is higher than that of doing nothing",
        "Lower optim.learning_rate, by a factor of 3 to 10 first; a longer optim.warmup_ratio may help too",
        learning.diverging,
    ),
    Rule(
        "chosen-falls",
        "warning",
        "The chosen responses are losing their probability",
        "Raise loss.beta or lower optim.learning_rate, both hold the policy nearer to its start; or give "
        "loss.sft_weight, which keeps the chosen responses likely",
        learning.chosen_falls,
    ),
    Rule(
        "likelihood-displaced",
        "warning",
        "The chosen responses have lost as much log-probability again as they had in all",
        "The margin grows while both responses become improbable, so what the model writes is likely neither: lower "
        "optim.learning_rate, raise loss.beta, or give loss.sft_weight, and read its answers (answers.number)",
        learning.likelihood_displaced,
    ),
    Rule(
        "rewards-fall",
        "info",
        "Both rewards are below 0, and that alone is normal for DPO",
        "Nothing is broken: the loss asks only that the chosen reward be above the rejected one, and both log-probs "
        "usually fall; watch that the margin grows and that train/logratio/chosen_per_token stays above "
        "−health.chosen_fall",
        learning.rewards_fall,
    ),
    Rule(
        "overfit",
        "warning",
        "Training accuracy is near 1 while an evaluation gets worse",
        "Stop (train.early_stop), keep the best checkpoint (checkpoint.keep_best), train fewer epochs, or take "
        "loss.name=ipo, which stops pushing pairs that are apart",
        learning.overfit,
    ),
    Rule(
        "length-bias",
        "warning",
        "Length and preference go together",
        "Look at the lengths with `inspect`; balance the data by length, or take a loss per token "
        "(loss.average=tokens, or loss.name=simpo)",
        learning.length_bias,
    ),
    Rule(
        "saturated",
        "info",
        "Nearly all pairs have no gradient left",
        "What is left of the run changes little: fewer epochs would do, or harder pairs",
        learning.saturated,
    ),
    Rule(
        "gradient-spike",
        "warning",
        "The gradient norm has jumped",
        "One jump is harmless where optim.max_grad_norm clips it; where they come again, lower optim.learning_rate or "
        "look at the rows of that step",
        machine.gradient_spike,
    ),
    Rule(
        "slow-rank",
        "warning",
        "One rank is slower than the others, which wait for it",
        "Look at that rank's machine: other processes, a throttled processor, its disk or network",
        machine.slow_rank,
    ),
    Rule(
        "memory-creep",
        "warning",
        "Memory keeps growing",
        "The job may run out of memory later: note where it stands, and restart it from a checkpoint before that",
        machine.memory_creep,
    ),
    Rule(
        "answers-collapsed",
        "warning",
        "The model no longer writes what its reference or the data would",
        "Do not use it, whatever its loss and accuracy are: read its answers, lower optim.learning_rate (by a factor "
        "of 3 to 10 first), raise loss.beta, or give loss.sft_weight, and train from the start again",
        answers.answers_collapsed,
        measured=True,
    ),
    Rule(
        "answers-worse",
        "warning",
        "The model's answers earn less reward than those of the model it started from",
        "Read answers before and after: where the pairs prefer something else than generate.rewards, mend one of "
        "the two; else lower optim.learning_rate or raise loss.beta",
        answers.answers_worse,
        measured=True,
    ),
    Rule(
        "answers-longer",
        "info",
        "The answers have become much longer",
        "Where that is not wanted, take a loss per token (loss.average=tokens, or loss.name=simpo) or balance the "
        "lengths of chosen and rejected responses (run `inspect`)",
        answers.answers_longer,
        measured=True,
    ),
    Rule(
        "answers-do-not-end",
        "warning",
        "More answers run to the limit without an end",
        "Look whether the chosen responses of data.train end with the template's end token and are cut by "
        "data.max_length (run `inspect`); else lower optim.learning_rate, or give loss.sft_weight",
        answers.answers_do_not_end,
        measured=True,
    ),
)
