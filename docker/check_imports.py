"""Ends the build of an image whose parts do not fit together: python check_imports.py."""

import importlib
import os
import pkgutil

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # there is no GPU while an image is built

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
