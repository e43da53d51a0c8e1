"""The section lora beside a model: what it names, and what is refused."""

from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from prefopt_dist.config import Lora
from prefopt_dist.errors import UserError
from prefopt_dist.setup.check_lora import adapter_of

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(*, tied: bool = False) -> PreTrainedConfig:
    return LlamaConfig(**SIZES, tie_word_embeddings=tied)


def mixtral() -> PreTrainedConfig:
    return MixtralConfig(**SIZES, num_local_experts=4)


def test_what_is_trained() -> None:
    found = adapter_of(Lora(r=4, experts=True), mixtral(), "hub/name")
    assert found is not None
    assert set(found.modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(found.parameters) == {"experts.gate_up_proj", "experts.down_proj"}
    found = adapter_of(Lora(r=4, dora=True, modules_to_save=("embed_tokens", "norm")), llama(), "hub/name")
    assert found is not None
    assert (found.dora, found.saved_modules, found.parameters) == (True, ("embed_tokens", "norm"), ())


@pytest.mark.parametrize(
    ("model", "section", "words"),
    [
        (llama(), {"target_modules": ("lm_head",)}, ["lora.target_modules: got 'lm_head'", "output head", "remove it"]),
        (llama(), {"experts": True}, ["lora.experts: got true", "llama", "set it to false"]),
        (mixtral(), {"experts": True, "dora": True}, ["lora.dora: got true", "must be false with lora.experts"]),
        (mixtral(), {"experts": True, "base": "nf4"}, ["lora.experts: got true", "must be false with lora.base=nf4"]),
        (llama(), {"dora": True, "base": "nf4"}, ["lora.dora: got true", "must be false with lora.base=nf4"]),
        (mixtral(), {"experts": True, "r": 25}, ["lora.r: got 25", "at most 16", "k_proj"]),
        (llama(), {"modules_to_save": ("lm_head",)}, ["lora.modules_to_save: got 'lm_head'", "output head", "merge"]),
        (
            llama(),
            {"modules_to_save": ("embed_token",)},
            ["lora.modules_to_save: got 'embed_token'", "did you mean embed_tokens"],
        ),
        (llama(), {"modules_to_save": ("mlp",)}, ["lora.modules_to_save: got 'mlp'", "weights of its own"]),
        (llama(), {"modules_to_save": ("q_proj",)}, ["lora.modules_to_save: got 'q_proj'", "one of them"]),
        (mixtral(), {"modules_to_save": ("experts",), "experts": True}, ["got 'experts'", "lora.experts"]),
        (llama(tied=True), {"modules_to_save": ("embed_tokens",)}, ["got 'embed_tokens'", "tied", "remove it"]),
    ],
)
def test_refused(model: PreTrainedConfig, section: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as fault:
        adapter_of(Lora(**{"r": 4, **section}), model, "hub/name")
    for word in words:
        assert word in str(fault.value), str(fault.value)
