"""What is refused before the queue where several ranks should share a row."""

from dataclasses import replace
from typing import Any

import models_for_tests as small
import pytest
import tiny_families
from transformers import AutoConfig, PreTrainedConfig

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.config import Config
from prefopt_dist.config.build import build_config
from prefopt_dist.errors import UserError
from prefopt_dist.setup import check_sequence_parallel

KEY = "model.name_or_path"


def config_of(**train: object) -> Config:
    return build_config({"run": {"dir": "r"}, "model": {"name_or_path": "m"}, "data": {"train": "d"}, "train": train})


def model(name: str, **changes: Any) -> PreTrainedConfig:
    if name in tiny_families.FAMILIES:
        return tiny_families.tiny_config(name, **changes)
    family, fields = small.MODELS[name]
    return AutoConfig.for_model(family, **(small.SIZES | fields | changes))


def refusal(train: dict[str, Any], models: list[Any], path: Any) -> str | None:
    """Return why a configuration is refused; None where it is taken."""
    try:
        check_sequence_parallel.check(config_of(**train), models, path)
    except UserError as e:
        return str(e)
    return None


@pytest.mark.parametrize("name", ["llama-mqa-biases", "gemma2", "gpt_oss", "gemma4_text", "deepseek_v3"])
def test_taken(name: str) -> None:
    for ranks in (2, 4):
        assert refusal({"sequence_parallel": ranks}, [(KEY, model(name))], "shared") is None


@pytest.mark.parametrize(
    ("train", "name", "path", "words"),
    [
        ({"sequence_parallel": 2}, "falcon_h1", "plain", ["got 2", "the path plain", "set it to 1"]),
        ({"sequence_parallel": 2}, "phi3-longrope", "alone", ["got 2", "the path alone", "set it to 1"]),
        (
            {"sequence_parallel": 3},
            "gemma2",
            "shared",
            ["got 3", KEY, "gemma2", "have 4 attention heads", "set it to 2"],
        ),
        ({"sequence_parallel": 8}, "gemma2", "packed", ["got 8", "set it to 4 or another divisor of 4"]),
        (
            {"sequence_parallel": 2, "router_aux_loss_coef": 0.1},
            "mixtral",
            "shared",
            ["got 2", "train.router_aux_loss_coef is 0.1", "default"],
        ),
    ],
)
def test_refused(train: dict[str, object], name: str, path: ComputePath, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        check_sequence_parallel.check(config_of(**train), [(KEY, model(name))], path)
    text = str(refused.value)
    assert text.startswith("train.sequence_parallel: ")
    assert all(word in text for word in words), text


@pytest.mark.parametrize("fusion", ["layers", "liger"])
def test_fused_layers_are_refused_before_the_data_is_read(fusion: str) -> None:
    config = config_of(sequence_parallel=2)
    config = replace(config, model=replace(config.model, compile=fusion))  # type: ignore[arg-type]
    words = rf"^train\.sequence_parallel: got 2, but model\.compile is {fusion}, .*; set model\.compile=auto$"
    with pytest.raises(UserError, match=words):
        check_sequence_parallel.check(config, [(KEY, model("gemma2"))], "shared")


def test_whole_rows_are_not_checked() -> None:
    assert refusal({"router_aux_loss_coef": 0.1}, [], "plain") is None


def test_ranks_of_a_machine() -> None:
    check_sequence_parallel.check_ranks(config_of(sequence_parallel=4), 8, "1 node")
    with pytest.raises(UserError, match=r"got 3, but 1 node has 8 ranks, .* Set it to 2, or take a multiple"):
        check_sequence_parallel.check_ranks(config_of(sequence_parallel=3), 8, "1 node")
