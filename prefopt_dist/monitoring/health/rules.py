"""The table of the health rules (docs/health.md describes them).

A rule is a pure function from the history of rows to its evidence, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health import answers, learning, machine
from prefopt_dist.monitoring.health.history import History, Level


@dataclass(frozen=True)
class Rule:
    """A health rule with the texts of its findings."""

    id: str
    level: Level
    title: str
    remedy: str
    check: Callable[[History, Health], str | None]
    """The function that returns the evidence after the last row, or None."""
    measured: bool = False
    """Whether the rule judges a single measurement instead of a window: one row without evidence is then a recovery."""


RULES: tuple[Rule, ...] = (
    Rule(
        "labels-flipped",
        "warning",
        "The model that the run starts from prefers the rejected responses",
        "Check whether chosen and rejected are swapped in data.train: run `inspect` and read some pairs",
        learning.labels_flipped,
    ),
    Rule(
        "accuracy-stuck",
        "warning",
        "Training accuracy is stuck near chance",
        "The labels may be ambiguous or random: run `inspect` and read some pairs. If they are not, raise "
        "optim.learning_rate or change loss.beta",
        learning.accuracy_stuck,
    ),
    Rule(
        "noisy-labels",
        "warning",
        "Some of the training labels contradict what the model has learnt from the others",
        "Run `inspect` and read pairs with a negative margin; train fewer epochs, or use loss.name=robust or "
        "loss.label_smoothing, which allow for wrong labels",
        learning.noisy_labels,
    ),
    Rule(
        "no-learning",
        "warning",
        "The policy has not changed since the start",
        "Raise optim.learning_rate; check train/learning_rate, train/grad_norm and train/skipped_steps",
        learning.no_learning,
    ),
    Rule(
        "diverging",
        "warning",
        "The loss is higher than at the start",
        "Lower optim.learning_rate, by a factor of 3 to 10 at first; a larger optim.warmup_ratio may help too",
        learning.diverging,
    ),
    Rule(
        "chosen-falls",
        "warning",
        "The chosen responses are losing their probability",
        "Raise loss.beta or lower optim.learning_rate, which both keep the policy closer to the start; or set "
        "loss.sft_weight, which keeps the chosen responses likely",
        learning.chosen_falls,
    ),
    Rule(
        "likelihood-displaced",
        "warning",
        "The chosen responses have become much less likely than before training",
        "The margin grows while both responses become improbable, so the model probably writes neither of them: lower "
        "optim.learning_rate, raise loss.beta or set loss.sft_weight, and read the model's answers (answers.number)",
        learning.likelihood_displaced,
    ),
    Rule(
        "rewards-fall",
        "info",
        "Both rewards are below 0, which alone is normal for DPO",
        "No action is needed: the loss requires only that the chosen reward is above the rejected one, and both "
        "log-probs usually fall. Check that the margin grows and that train/logratio/chosen_per_token stays above "
        "−health.chosen_fall",
        learning.rewards_fall,
    ),
    Rule(
        "overfit",
        "warning",
        "Training accuracy is near 1 while an evaluation gets worse",
        "Stop early (train.early_stop), keep the best checkpoint (checkpoint.keep_best), train fewer epochs, or use "
        "loss.name=ipo, which does not increase margins without limit",
        learning.overfit,
    ),
    Rule(
        "length-bias",
        "warning",
        "The preference is correlated with the length of the responses",
        "Look at the lengths with `inspect`; balance the data by length, or use a loss per token "
        "(loss.average=tokens, or loss.name=simpo)",
        learning.length_bias,
    ),
    Rule(
        "saturated",
        "info",
        "Nearly all pairs have no gradient left",
        "The rest of the run will change little: train fewer epochs, or use harder pairs",
        learning.saturated,
    ),
    Rule(
        "gradient-spike",
        "warning",
        "The gradient norm has jumped",
        "A single jump is harmless where optim.max_grad_norm clips it; if jumps are repeated, lower "
        "optim.learning_rate or look at the rows of data in that step",
        machine.gradient_spike,
    ),
    Rule(
        "slow-rank",
        "warning",
        "One rank is slower than the others, which wait for it",
        "Check that rank's machine for other processes, a throttled processor, and a slow disk or network",
        machine.slow_rank,
    ),
    Rule(
        "memory-creep",
        "warning",
        "Memory keeps growing",
        "The job may run out of memory later: watch perf/memory_gib, and restart the job from a checkpoint before the "
        "memory is full",
        machine.memory_creep,
    ),
    Rule(
        "answers-collapsed",
        "warning",
        "The model has collapsed: its answers resemble neither those of the reference nor the data",
        "Do not use the model, even if its loss and accuracy are good: read its answers, lower optim.learning_rate (by "
        "a factor of 3 to 10 at first), raise loss.beta or set loss.sft_weight, and train from the start again",
        answers.answers_collapsed,
        measured=True,
    ),
    Rule(
        "answers-worse",
        "warning",
        "The model's answers earn less reward than those of the model it started from",
        "Read the answers before and after training. If the pairs prefer something else than generate.rewards, correct "
        "one of the two; otherwise lower optim.learning_rate or raise loss.beta",
        answers.answers_worse,
        measured=True,
    ),
    Rule(
        "answers-longer",
        "info",
        "The answers have become much longer",
        "If this is not wanted, use a loss per token (loss.average=tokens, or loss.name=simpo), or balance the lengths "
        "of chosen and rejected responses (run `inspect`)",
        answers.answers_longer,
        measured=True,
    ),
    Rule(
        "answers-do-not-end",
        "warning",
        "More answers reach the length limit without an end",
        "Check whether the chosen responses of data.train end with the template's end token, and whether they are "
        "truncated to data.max_length (run `inspect`); otherwise lower optim.learning_rate or set loss.sft_weight",
        answers.answers_do_not_end,
        measured=True,
    ),
)
