"""The loads of a mixture's experts and their balancing loss, against plain float64, on every path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import plain
import pytest
import tiny_families
import torch
from models_for_tests import apart, gradients, pairs, references, worst
from plain_experts import PlainExperts
from transformers import AutoConfig, PreTrainedConfig

from prefopt_dist.batching.micro_batch import PATHS, ComputePath
from prefopt_dist.batching.packing import pack
from prefopt_dist.config import load_config
from prefopt_dist.errors import UserError
from prefopt_dist.model.expert_loads import ExpertLoads
from prefopt_dist.model.load import attention_of
from prefopt_dist.model.routers import find_routers
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO
from prefopt_dist.setup.experts import check_balancing

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
}
COEFFICIENT = 0.7
CPU = torch.device("cpu")


def config_of(family: str) -> PreTrainedConfig:
    if family in tiny_families.FAMILIES and family not in EXPERTS:
        return tiny_families.tiny_config(family)
    nothing = {name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    fields = {"num_hidden_layers": 2, "tie_word_embeddings": False, **EXPERTS.get(family, {})}
    return AutoConfig.for_model(family, **tiny_families.SIZES | fields | nothing)


def model_of(family: str, path: ComputePath) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    lm.set_attn_implementation(attention_of(lm.config, path))
    return lm


@pytest.mark.parametrize(
    ("family", "layers", "affinity"),
    [
        ("mixtral", [0, 1], "softmax"),
        ("qwen3_moe", [0, 1], "softmax"),
        ("gpt_oss", [0, 1, 2], "softmax"),
        ("deepseek_v3", [1, 2], "sigmoid"),
        ("glm4_moe", [1, 2], "sigmoid"),
        ("gemma4_text", [0, 1], "given"),
        ("llama", [], None),
        ("jetmoe", [], None),
    ],
)
def test_routers_are_found_and_measured(family: str, layers: list[int], affinity: str | None) -> None:
    """In the layers that have experts; a family whose outputs are not known has none."""
    routers = find_routers(config_of(family))
    assert [router.layer for router in routers] == layers
    assert {router.affinity for router in routers} == ({affinity} if layers else set())
    assert all((router.scores, router.chosen) == (0, 2) for router in routers)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_loads_and_balancing_loss_equal_float64(family: str) -> None:
    """On every path, in one micro-batch and several, cut or not, with and without recomputed layers."""
    units = pairs()[:9]
    reference = references(units)
    routers = find_routers(config_of(family))
    exact = plain.build_plain(model_of(family, "plain"))
    affinity = routers[0].affinity
    assert affinity is not None
    experts = PlainExperts(exact, [router.name for router in routers], affinity)
    found = [[experts.sequence(u.prompt, r) for r in u.responses] for u in units]
    sums, balances = (torch.stack([torch.stack([x[i] for x in row]) for row in found]) for i in (0, 1))
    (plain.dpo_loss(sums, reference, 0.3).mean() + COEFFICIENT * balances.mean()).backward()
    most = experts.max_load()
    assert len(set(most.values())) > 1
    wanted = gradients(exact)
    for path in PATHS:
        for parts, checkpointing in ((1, False), (3, False), (1, True)):
            lm = model_of(family, path).train()
            if checkpointing:
                lm.activation_checkpointing_enable({"use_reentrant": False})
            loads = ExpertLoads(routers, COEFFICIENT, CPU)
            scorer = Scorer(lm, path, cut=parts == 1, loads=loads)
            for part in range(parts):
                rows = list(range(part, len(units), parts))
                batch = pack([units[i] for i in rows], 2, path, 3)
                terms = scorer(batch, DPO(0.3), reference[rows])
                (terms.loss / len(units)).backward()
                for number in scorer.rest():
                    number.backward()
                assert apart(terms.sums, sums[rows].detach()) <= 1e-6, path
            error, tensor = worst(gradients(lm), wanted)
            assert error <= 1e-5, (path, parts, checkpointing, tensor)
            with torch.no_grad():
                scorer(batch, DPO(0.3), reference[rows])  # an evaluation counts nothing
            summary = loads.summary(loads.take()).tolist()
            metrics = loads.metrics(summary, len(units))
            for router in routers:
                assert metrics[f"router/max_load_of/{router.layer}"] == pytest.approx(most[router.name], rel=1e-12)
            assert metrics["router/max_load"] == pytest.approx(sum(most.values()) / len(most), rel=1e-12)
            assert metrics["router/balancing_loss"] == pytest.approx(balances.mean().item(), rel=1e-6)
            assert not loads.take().any()


@pytest.mark.parametrize("path", PATHS)
def test_a_weight_of_2_is_the_row_twice(path: ComputePath) -> None:
    one, two = pairs()[:2]
    routers = find_routers(config_of("mixtral"))
    found = []
    for units in ([replace(one, weight=1.0), replace(two, weight=2.0)], [one, two, two]):
        loads = ExpertLoads(routers, 1.0, CPU)
        Scorer(model_of("mixtral", path), path, loads=loads)(pack(units, 2, path), DPO(0.3), references(units))
        found.append(loads.take())
    assert torch.allclose(*found, rtol=1e-6)
    assert found[0][:4].tolist() == found[1][:4].tolist()


def test_without_a_coefficient_the_loss_is_as_before_to_the_bit() -> None:
    units = pairs()[:5]
    reference = references(units)
    routers = find_routers(config_of("mixtral"))
    found = []
    for loads in (None, ExpertLoads(routers, 0.0, CPU)):
        lm = model_of("mixtral", "shared")
        terms = Scorer(lm, loads=loads)(pack(units, 2), DPO(0.3), reference)
        terms.loss.backward()
        found.append([terms.loss.detach(), *gradients(lm).values()])
    assert loads is not None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    summary = loads.summary(loads.take()).tolist()
    assert len(summary) == loads.size
    assert loads.metrics(summary, 5).keys() == {"router/max_load", "router/max_load_of/0", "router/max_load_of/1"}
    assert loads.metrics([0.0] * loads.size, 5) == {}


def test_a_share_of_steps() -> None:
    """Means over steps of the largest load, and over pairs of the loss; an empty step has the least load."""
    routers = find_routers(config_of("mixtral"))[:1]
    loads = ExpertLoads(routers, 0.5, CPU)
    steps = [torch.tensor([6.0, 2, 0, 0, 12.0]), torch.tensor([2.0, 2, 2, 2, 4.0]), torch.zeros(5)]
    summaries = [loads.summary(step.double()) for step in steps]
    assert [s.tolist() for s in summaries] == [[3.0, 1.0, 12.0], [1.0, 1.0, 4.0], [0.0, 1.0, 0.0]]
    metrics = loads.metrics((summaries[0] + summaries[1]).tolist(), 8)
    assert metrics == {"router/max_load": 2.0, "router/max_load_of/0": 2.0, "router/balancing_loss": 2.0}


@pytest.mark.parametrize(
    ("family", "words"),
    [("llama", "which has no experts whose router is known here"), ("phimoe", "in a way that is not known here")],
)
def test_a_balancing_loss_that_cannot_be_given_is_refused(tmp_path: Any, family: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {dir: r}\nmodel: {name_or_path: m}\ndata: {train: d}\n")
    config = load_config(str(file), ["train.router_aux_loss_coef=0.001"])
    with pytest.raises(UserError, match=f"train.router_aux_loss_coef: got 0.001, but m is a {family} model, .*{words}"):
        check_balancing(config, config_of(family))
    check_balancing(load_config(str(file), []), config_of(family))
    check_balancing(config, config_of("mixtral"))
