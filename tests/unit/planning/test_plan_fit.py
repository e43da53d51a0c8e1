"""`plan`: what fits on which machines, and what is refused and with what remedy."""

from dataclasses import replace

import pytest
from planned_models import GIB, POLICY, h200, needs_of, refused, with_adapters

from prefopt_dist.planning import memory
from prefopt_dist.planning.fit import Fit, find_fit, fits_with_offloading
from prefopt_dist.planning.generation_memory import GenerationSettings
from prefopt_dist.planning.phases import Placement
from prefopt_dist.planning.zero_settings import ZeroSettings


def test_a_whole_copy_that_does_not_fit_is_refused_whatever_the_number_of_ranks() -> None:
    """A 70B's bfloat16 weights are 131 GiB on each GPU of an h200, of which 118 GiB may be used."""
    asked = GenerationSettings(batch_tokens=32_768, prompt_tokens=768, new_tokens=256, n=8, uses_top_p=False)
    message = refused(needs_of("70B", generation=asked), h200(8))
    assert message.startswith("plan: generation needs about 1")
    assert "take a smaller model" in message
    assert message.endswith("If the run only trains, on pairs that exist already, set generate.rewards=[].")
    assert find_fit(needs_of("70B"), h200(8)).checkpointed is not None
    assert "generate.rewards" not in refused(needs_of("70B", generation=asked), h200(1)), "training does not fit either"
    fits = needs_of("8B", generation=asked)
    assert find_fit(fits, h200(1)).checkpointed is not None
    message = refused(needs_of("8B", generation=replace(asked, batch_tokens=2_000_000)), h200(1))
    most = int(message.split("lower generate.batch_tokens to at most ")[1].split(";")[0].rstrip("."))
    assert "recomputed" not in message
    for tokens, fitting in ((most, True), (most + 1, False)):
        again = needs_of("8B", generation=replace(asked, batch_tokens=tokens))
        assert (find_fit(again, h200(1)).checkpointed is not None) == fitting


def test_adapters_let_a_70b_fit_on_8_gpus() -> None:
    """Which training all of its weights does not: see below."""
    assert find_fit(needs_of("70B"), h200(1)).checkpointed is None
    assert find_fit(with_adapters("70B"), h200(1)).checkpointed is not None


@pytest.mark.parametrize(
    ("name", "nodes", "parameters", "states", "worst", "checkpointed"),
    [
        ("8B", 1, 8_030_261_248, 16.8, 76.2, 0),
        ("8B", 8, 8_030_261_248, 2.1, 61.5, 0),
        ("70B", 8, 70_553_706_496, 18.5, 115.4, 58),
    ],
)
def test_large_models_on_h200(
    name: str, nodes: int, parameters: int, states: float, worst: float, checkpointed: int
) -> None:
    """18 bytes a parameter over the ranks: bfloat16 weights, float32 gradients, master weights and two moments."""
    needs, machine = needs_of(name), h200(nodes)
    assert needs.sizes.parameters == parameters
    found = find_fit(needs, machine)
    held = sum(p.bytes for p in memory.training_states(needs.sizes, needs.policy, Placement(machine.ranks, True)))
    assert held == pytest.approx(18 * parameters / machine.ranks, rel=0.01)
    assert held / GIB == pytest.approx(states, abs=0.1)
    assert found.device / GIB == pytest.approx(worst, abs=1.0)
    assert found.checkpointed is not None
    assert abs(found.checkpointed - checkpointed) <= 1


def test_70b_on_8_gpus_is_refused_with_what_would_do() -> None:
    message = refused(needs_of("70B"), h200(1))
    assert message.startswith("plan: training: backward needs about 181 GiB on each rank of 1 node of 8 GPUs (h200)")
    assert "118 GiB of 131 GiB may be used" in message
    assert "set offload_optimizer (device cpu) in deepspeed.policy" in message
    assert "use at least 16 such GPUs (plan.nodes=2)" in message
    assert "micro_batch_tokens" not in message, "the states alone do not fit"
    assert find_fit(needs_of("70B"), h200(2)).checkpointed is not None


def test_a_micro_batch_that_is_too_large_is_refused_with_one_that_fits() -> None:
    needs = needs_of("8B").with_tokens(600_000)
    message = refused(needs, h200(1))
    most = int(message.split("from 600000 to at most ")[1].split(";")[0].rstrip("."))
    assert find_fit(needs.with_tokens(most), h200(1)).checkpointed is not None
    assert find_fit(needs.with_tokens(most + 1), h200(1)).checkpointed is None


def test_a_first_pass_that_is_too_large_is_told_from_training() -> None:
    message = refused(needs_of("8B", reference_tokens=2_000_000, reference_follows=False), h200(1))
    assert message.startswith("plan: first pass needs")
    assert "lower reference.micro_batch_tokens from 2000000 to at most" in message
    assert "lower train.micro_batch_tokens" not in message


def test_checkpointing_none_is_refused_where_auto_would_do() -> None:
    assert "set model.checkpointing=auto" in refused(needs_of("8B", tokens=30_000, checkpointing="none"), h200(1))


def test_no_setting_is_said_twice() -> None:
    needs = needs_of("8B", policy=ZeroSettings.of(POLICY, 2).offloading(True, True))
    needs = replace(needs, reference=needs.reference.offloading(False, True))
    assert [f.name for f in fits_with_offloading(needs, h200(1)) if isinstance(f, Fit)].count("and offload_param") == 0
