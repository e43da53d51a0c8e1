"""Checks of a loss beside the models: beginnings of responses under a rotary scaling that looks at the length."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import worlds
from transformers import LlamaConfig

from prefopt_dist.config import load_config
from prefopt_dist.config.losses import DPOLoss
from prefopt_dist.errors import UserError
from prefopt_dist.setup.check_loss import check_beginnings

KEY = "model.name_or_path"
MIX: dict[str, Any] = {"dpo": {"weight": 1, "ld_alpha": 0.5}, "sft": {"weight": 1}}


@pytest.mark.parametrize("loss", [{"name": "dpo", "ld_alpha": 0.5}, {"name": "mix", "of": MIX}])
def test_beginnings_under_a_rotary_scaling_by_length(tmp_path: Path, loss: dict[str, Any]) -> None:
    """The policy's beginning is within its response, the reference's by itself, where other angles hold."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = LlamaConfig(max_position_embeddings=48, rope_parameters=rope)
    worlds.write_run(tmp_path / "run.yaml", tmp_path / "model", tmp_path / "rows", tmp_path / "run", loss=loss)
    config = load_config(tmp_path / "run.yaml")
    key = "loss.of.dpo.ld_alpha" if loss["name"] == "mix" else "loss.ld_alpha"
    with pytest.raises(
        UserError, match=rf"^{key}: got 0\.5, but the rotary scaling dynamic of model\.name_or_path .* 48"
    ):
        check_beginnings(config, model, KEY)
    short = ["data.max_length=48", "data.max_prompt_length=24"]
    check_beginnings(load_config(tmp_path / "run.yaml", short), model, KEY)
    check_beginnings(config, LlamaConfig(max_position_embeddings=48), KEY)
    check_beginnings(replace(config, loss=DPOLoss()), model, KEY)
