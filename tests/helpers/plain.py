"""The exact answer: float64, unsharded, unpadded, one sequence at a time, by plain transformers and the papers.

Nothing here comes from the package: no packing, no own attention, no own head, no objective. transformers'
own RMSNorm and eager softmax round to float32 in a float64 model too, and its other attentions know no
soft-capping, so the norms are exchanged for exact ones and the attention is the textbook's, in float64 with
transformers' own masks; what remains in float32 is the table of rotary angles, which belongs to the model
(sine and cosine are rounded alike in a float32 model).

Legend: P pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

Ids = Sequence[int] | np.ndarray


def build_plain(source: Any) -> nn.Module:
    """A float64 model of its own from a folder (read with from_pretrained) or a model in memory (copied)."""
    if isinstance(source, (str, Path)):
        # The folder's own dtype first: float32 widened to float64 loses nothing.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="plain")
    else:
        config = type(source.config).from_dict(copy.deepcopy(source.config.to_dict()))
        config._attn_implementation = "plain"
        model = type(source)(config).to(torch.float64)
        model.load_state_dict({k: v.detach().to(torch.float64) for k, v in source.state_dict().items()})
    model.config.use_cache = False
    model.config._experts_implementation = "eager"  # torch's grouped product knows no float64
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_exact_norm, module)
    return model.eval()


def _exact_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    if type(self).__name__.startswith("Gemma"):  # its weights are stored as their distance from 1
        return (1 + self.weight) * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q kᵀ · scaling + mask) v; the scores capped by c·tanh(·/c) where the model says so."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores + attention_mask, dim=-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", _attention)
AttentionMaskInterface.register("plain", eager_mask)


def token_log_probs(model: Any, prompt: Ids, response: Ids) -> torch.Tensor:
    """float64 [len(response)]: log π(y_t | x, y_<t), differentiable."""
    ids = torch.tensor([[*map(int, prompt), *map(int, response)]])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    assert logits.dtype == torch.float64
    first = len(prompt) - 1  # the prompt's last token predicts the response's first
    scores = torch.log_softmax(logits[first : first + len(response)], dim=-1)
    return scores.gather(-1, ids[0, len(prompt) :, None])[:, 0]


def sequence_logp(model: Any, prompt: Ids, response: Ids) -> torch.Tensor:
    """float64 []: log π(y | x) = Σ_t log π(y_t | x, y_<t), differentiable."""
    return token_log_probs(model, prompt, response).sum()


def pair_log_probs(model: Any, prompt: Ids, chosen: Ids, rejected: Ids) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [] each: log π(y_w | x), log π(y_l | x)."""
    return sequence_logp(model, prompt, chosen), sequence_logp(model, prompt, rejected)


def dpo_loss(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """[P] from [P, 2] and [P, 2]: equation 7 of arXiv:2305.18290, smoothed as in Mitchell's cDPO note.

    −log σ(h) = log(1 + e^(−h)),  h = β (log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l))
    """
    h = beta * ((logps[:, 0] - ref_logps[:, 0]) - (logps[:, 1] - ref_logps[:, 1]))
    zero = torch.zeros_like(h)
    right, wrong = torch.logaddexp(zero, -h), torch.logaddexp(zero, h)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def dpo_gradient(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """[P, 2] ∂L/∂log π: −β [(1 − ε) σ(−h) − ε σ(h)] for the chosen, its negative for the rejected."""
    h = beta * ((logps[:, 0] - ref_logps[:, 0]) - (logps[:, 1] - ref_logps[:, 1]))
    by_chosen = -beta * ((1 - label_smoothing) / (1 + torch.exp(h)) - label_smoothing / (1 + torch.exp(-h)))
    return torch.stack([by_chosen, -by_chosen], dim=1)


def dpo(
    logps: torch.Tensor, ref_logps: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> dict[str, torch.Tensor]:
    """Means over the P pairs of [P, 2] log-probs (chosen, rejected), by metric name; `loss` is differentiable."""
    ratio = logps - ref_logps
    reward = beta * ratio
    return {
        "loss": dpo_loss(logps, ref_logps, beta, label_smoothing).mean(),
        "rewards/chosen": reward[:, 0].mean(),
        "rewards/rejected": reward[:, 1].mean(),
        "rewards/margins": (reward[:, 0] - reward[:, 1]).mean(),
        "rewards/accuracies": (reward[:, 0] > reward[:, 1]).double().mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
        "logps/accuracies": (logps[:, 0] > logps[:, 1]).double().mean(),
        "logratio/chosen": ratio[:, 0].mean(),
        "logratio/rejected": ratio[:, 1].mean(),
    }


def sft_loss(model: Any, rows: Sequence[tuple[Ids, Ids]]) -> torch.Tensor:
    """Mean over (prompt, response) rows of −log π(y | x) / |y|; differentiable."""
    return torch.stack([-token_log_probs(model, x, y).mean() for x, y in rows]).mean()


def pair_loss(
    options: dict[str, Any], logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[P] loss and [P, 2] rewards of the loss with the configuration's `options` (all of them), differentiable.

    logps, ref_logps, lengths [P, 2] (chosen, rejected). Each as its paper prints it; nothing is done for extremes.
    A mix's rewards are the first part's.
    """
    if options["name"] == "mix":
        parts = [pair_loss({"name": n, **o}, logps, ref_logps, lengths) for n, o in options["of"].items()]
        weights = [part["weight"] for part in options["of"].values()]
        return sum(w * loss for w, (loss, _) in zip(weights, parts, strict=True)), parts[0][1]
    if options["name"] == "sft":
        return -logps[:, 0] / lengths[:, 0], torch.zeros_like(logps)
    name, beta = options["name"], options.get("beta")
    per_token = options.get("average") == "tokens"
    ratio = logps - ref_logps
    t, alpha = torch.exp(ratio), options.get("divergence_alpha", 0.5)
    match options.get("divergence", "reverse_kl"):  # arXiv:2309.16240, f'(t) with f'(1) = 0
        case "forward_kl":
            ratio = 1 - 1 / t
        case "jensen_shannon":
            ratio = torch.log(2 * t / (1 + t))
        case "alpha":
            ratio = (t ** (alpha - 1) - 1) / (alpha - 1)
    ratio = ratio / (lengths if per_token else torch.ones_like(logps))
    reward = beta * ratio
    difference = ratio[:, 0] - ratio[:, 1]
    mean = logps / lengths
    match name:
        case "dpo":  # arXiv:2305.18290, equation 7; per token arXiv:2411.15124; smoothed as cDPO
            eps = options["label_smoothing"]
            right = torch.logaddexp(torch.zeros_like(difference), -beta * difference)
            loss = right + eps * beta * difference  # ℓ(−m) = ℓ(m) + m
        case "robust":  # arXiv:2403.00409: the unbiased estimator
            eps = options["label_smoothing"]
            right, wrong = (torch.log1p(torch.exp(s * beta * difference)) for s in (-1, 1))
            loss = ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)
        case "ipo":  # arXiv:2310.12036, equation 17: (h − τ⁻¹/2)²
            loss = (difference - beta**-1 / 2).square()
        case "hinge":  # arXiv:2309.06657: max(0, 1 − γ[…])
            loss = torch.maximum(torch.zeros_like(difference), 1 - beta * difference)
        case "exo_pair":  # arXiv:2402.00856, equation 16: KL of the policy's preference from the label's
            q, p = torch.sigmoid(beta * difference), 1 - options["label_smoothing"]
            loss = q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p))
        case "discopop":  # arXiv:2406.08414, equation 5
            share = 1 / (1 + torch.exp(-beta * difference / options["temperature"]))
            loss = (1 - share) * torch.log1p(torch.exp(-beta * difference)) + share * torch.exp(-beta * difference)
        case "apo_zero":  # arXiv:2408.06266, equation 7
            loss = 1 - 1 / (1 + torch.exp(-reward[:, 0])) + 1 / (1 + torch.exp(-reward[:, 1]))
        case "apo_down":  # arXiv:2408.06266, equation 8
            loss = 1 / (1 + torch.exp(-reward[:, 0])) + 1 - 1 / (1 + torch.exp(-beta * difference))
        case "bco_pair":  # arXiv:2404.04656, with a shift of 0
            loss = torch.log1p(torch.exp(-reward[:, 0])) + torch.log1p(torch.exp(reward[:, 1]))
        case "nca_pair":  # arXiv:2402.05369, two responses
            up, down = torch.log1p(torch.exp(-reward)), torch.log1p(torch.exp(reward))
            loss = up[:, 0] + (down[:, 0] + down[:, 1]) / 2
        case "sppo_hard":  # arXiv:2405.00675, equation 4.7, with win rates of 1 and 0
            loss = (ratio[:, 0] - 0.5 / beta).square() + (ratio[:, 1] + 0.5 / beta).square()
        case "cal_dpo":  # arXiv:2412.14516, weighted as in its authors' code
            squares = (ratio[:, 0] - 0.5 / beta).square() + (ratio[:, 1] + 0.5 / beta).square()
            loss = torch.log1p(torch.exp(-difference)) + squares / 2
        case "dpop":  # arXiv:2402.13228, equation 3
            fall = torch.maximum(torch.zeros_like(difference), (ref_logps - logps)[:, 0])
            loss = torch.log1p(torch.exp(-beta * (difference - options["penalty"] * fall)))
        case "alphapo":  # arXiv:2501.03884
            reward = beta * (1 - torch.exp(mean) ** -options["alpha"]) / options["alpha"]
            loss = torch.log1p(torch.exp(options["gamma"] - (reward[:, 0] - reward[:, 1])))
        case "cpo":  # arXiv:2401.08417, equation 3, smoothed as cDPO; its likelihood is the SFT term
            reward, eps = beta * logps, options["label_smoothing"]
            margin = reward[:, 0] - reward[:, 1]
            loss = torch.log1p(torch.exp(-margin)) + eps * margin
        case "simpo":  # arXiv:2405.14734, equation 6
            reward = beta * mean
            loss = torch.log1p(torch.exp(options["gamma"] - (reward[:, 0] - reward[:, 1])))
        case "orpo":  # arXiv:2403.07691, equations 4 to 7
            reward = beta * mean
            odds = torch.exp(mean) / (1 - torch.exp(mean))
            loss = -mean[:, 0] - beta * torch.log(odds[:, 0] / (odds[:, 0] + odds[:, 1]))  # σ(log x) = x / (1 + x)
        case _:
            raise AssertionError(name)
    if options.get("sft_weight"):
        loss = loss - options["sft_weight"] * mean[:, 0]  # arXiv:2404.19733, equation 1
    return loss, reward


def ranked_loss(name: str, rewards: Sequence[torch.Tensor], ranks: Sequence[int]) -> torch.Tensor:
    """[] of one row of K rewards [] and ranks (the lowest is the best), by loops over the responses."""
    below = [[j for j in range(len(ranks)) if ranks[j] > ranks[i]] for i in range(len(ranks))]
    if name == "plackett_luce":  # arXiv:2305.18290, appendix A.3: each against those below it
        of = [r.exp() / (r.exp() + sum(rewards[j].exp() for j in b)) for r, b in zip(rewards, below, strict=True)]
        return -sum(share.log() for share in of)
    pairs = [(i, j) for i, b in enumerate(below) for j in b]
    return sum(torch.log1p(torch.exp(rewards[j] - rewards[i])) for i, j in pairs) / len(pairs)


def kto_loss(
    logps: torch.Tensor, ref_logps: torch.Tensor, desirable: Sequence[bool], z0: float, options: dict[str, Any]
) -> torch.Tensor:
    """[P] of P rated rows, [P] each: λ_y − v(x, y), equations 7 and 8 of arXiv:2402.01306, row by row."""
    losses = []
    for logp, ref_logp, good in zip(logps, ref_logps, desirable, strict=True):
        weight = options["desirable_weight" if good else "undesirable_weight"]
        gain = (logp - ref_logp - z0) if good else (z0 - (logp - ref_logp))
        losses.append(weight - weight / (1 + torch.exp(-options["beta"] * gain)))
    return torch.stack(losses)
