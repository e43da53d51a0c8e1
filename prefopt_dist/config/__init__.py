"""The configuration of a run: schema, strict YAML, overrides, DeepSpeed's JSON files, masking of secrets."""

from prefopt_dist.config.data import Data, DataSource, Inspect
from prefopt_dist.config.deepspeed_json import load_deepspeed_json
from prefopt_dist.config.load import differing_keys, identity, load_config, to_dict, to_yaml
from prefopt_dist.config.losses import LOSSES, DPOLoss, Loss, MixLoss, SFTLoss
from prefopt_dist.config.rollouts import Generate, Judge, RewardServer, RewardSource, Rounds
from prefopt_dist.config.schema import (
    Answers,
    Config,
    Evaluate,
    Plan,
    Run,
    Tracking,
    Wandb,
)
from prefopt_dist.config.secrets import mask_secrets
from prefopt_dist.config.training import Checkpoint, DeepSpeed, Eval, Export, Lora, Model, Optim, Reference, Train

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
    "Judge",
    "Lora",
    "Loss",
    "MixLoss",
    "Model",
    "Optim",
    "Plan",
    "Reference",
    "RewardServer",
    "RewardSource",
    "Rounds",
    "Run",
    "SFTLoss",
    "Tracking",
    "Train",
    "Wandb",
    "differing_keys",
    "identity",
    "load_config",
    "load_deepspeed_json",
    "mask_secrets",
    "to_dict",
    "to_yaml",
]
