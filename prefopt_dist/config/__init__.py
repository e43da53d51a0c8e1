"""What a run is told: schema, strict YAML, overrides, DeepSpeed's JSON files."""

from prefopt_dist.config.deepspeed_json import load_deepspeed_json
from prefopt_dist.config.dump import to_dict, to_yaml
from prefopt_dist.config.findings import Inspect
from prefopt_dist.config.identity import differing, identity
from prefopt_dist.config.load import load_config
from prefopt_dist.config.lora import Lora
from prefopt_dist.config.losses import LOSSES, DPOLoss, Loss, MixLoss, SFTLoss
from prefopt_dist.config.schema import (
    Answers,
    Checkpoint,
    Config,
    Data,
    DataSource,
    DeepSpeed,
    Eval,
    Evaluate,
    Export,
    Generate,
    Model,
    Optim,
    Plan,
    Reference,
    RewardSource,
    Rounds,
    Run,
    Tracking,
    Train,
    Wandb,
)
from prefopt_dist.config.secrets import mask_secrets

__all__ = [
    "LOSSES",
    "Answers",
    "Checkpoint",
    "Config",
    "DPOLoss",
    "Data",
    "DataSource",
    "DeepSpeed",
    "Eval",
    "Evaluate",
    "Export",
    "Generate",
    "Inspect",
    "Lora",
    "Loss",
    "MixLoss",
    "Model",
    "Optim",
    "Plan",
    "Reference",
    "RewardSource",
    "Rounds",
    "Run",
    "SFTLoss",
    "Tracking",
    "Train",
    "Wandb",
    "differing",
    "identity",
    "load_config",
    "load_deepspeed_json",
    "mask_secrets",
    "to_dict",
    "to_yaml",
]
