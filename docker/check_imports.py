"""Import every module, so that the build of an image with incompatible parts fails: python check_imports.py."""

import importlib
import os
import pkgutil

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # an image is built without a GPU

import deepspeed
import torch
import transformers

import prefopt_dist

names = [m.name for m in pkgutil.walk_packages(prefopt_dist.__path__, "prefopt_dist.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(f"{len(names)} modules; torch {torch.__version__}, transformers {transformers.__version__}", end=", ")
print(f"deepspeed {deepspeed.__version__}")
