"""Configuration: DeepSpeed's JSON, and the mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_texts import write
from places import REPOSITORY

from prefopt_dist.config import load_deepspeed_json
from prefopt_dist.errors import UserError


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_shipped_deepspeed_files_are_accepted(name: str) -> None:
    settings = load_deepspeed_json(REPOSITORY / f"deepspeed_configs/{name}_zero3.json", f"deepspeed.{name}")
    assert settings["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train_batch_size": 8}', ["train_batch_size", "train.global_batch_pairs"]),
        ('{"gradient_clipping": 1.0}', ["optim.max_grad_norm"]),
        ('{"bf16": {"enabled": true}}', ["bf16", "model.dtype"]),
        ('{"optimizer": {"type": "Adam"}}', ["optim section"]),
        ('{"wandb": {}}', ["tracking"]),
        ('{"activation_checkpointing": {}}', ["model.checkpointing"]),
        ('{"hybrid_engine": {}}', ["hybrid_engine", "not supported"]),
        ('{"zero_optimisation": {}}', ["zero_optimisation", "did you mean zero_optimization"]),
        ('{"zero_optimization": {"stage3_max_live_parametrs": 1}}', ["stage3_max_live_parameters"]),
        ('{"zero_optimization": {"stage": 4}}', ["zero_optimization.stage", "4"]),
        ('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}', ["reduce_bucket_size", "auto"]),
        (
            '{"zero_optimization": {"offload_param": {"devise": "cpu"}}}',
            ["offload_param.devise", "not a key"],
        ),
        ('{"zero_optimization": 3}', ["zero_optimization", "object"]),
        ('{"comms_logger": {"enabld": true}}', ["comms_logger.enabld", "enabled"]),
        ('{"aio": {"block_sise": 1}}', ["aio.block_sise", "block_size"]),
        ('{"data_types": {"param_dtype": "fp16"}}', ["data_types.param_dtype", "model.dtype"]),
        ('{"data_types": {"grad_dtype": "fp32"}}', ["data_types.grad_dtype", "grad_accum_dtype"]),
        ('{"data_types": {"grad_accum_dtype": "fp16"}}', ["grad_accum_dtype", "fp32, bf16"]),
        ('{"communication_data_type": ["fp32"]}', ["communication_data_type", "fp32, bf16"]),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', ["'stage' stands twice"]),
        ('{\n"zero_optimization": {},\n}', ["ds.json:3", "not JSON"]),
        ('{"zero_optimization": {"reduce_bucket_size": NaN}}', ["NaN"]),
        ("[]", ["object"]),
    ],
)
def test_deepspeed_mistakes(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_deepspeed_json(write(tmp_path / "ds.json", text), "deepspeed.policy")
    for word in ["ds.json", *words]:
        assert word in str(caught.value)


def test_a_missing_deepspeed_file_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"deepspeed\.policy does not exist"):
        load_deepspeed_json(tmp_path / "none.json", "deepspeed.policy")
