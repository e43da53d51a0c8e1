"""What an export carries besides weights: the template that was trained with, and where generation is to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import worlds
from tokenizers_for_tests import CHATML
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prefopt_dist.data.template import PLAIN_TEMPLATE

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def train(
    tmp_path: Path, template: str | None, rows: list[dict[str, Any]] | None = None, **loss: Any
) -> tuple[Path, str]:
    """The exported folder and what was said, of a short run from a model with this chat template."""
    worlds.write_model(tmp_path / "model", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = [{"prompt": f"the cat {k}", "chosen_response": "sings", "rejected_response": "sleeps"} for k in range(4)]
    rows = 4 * rows if rows else pairs
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    worlds.write_run(
        tmp_path / "run.yaml", tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run",
        optim={"learning_rate": 0.02, "warmup_ratio": 0.0}, train={"global_batch_pairs": 4, "epochs": 30}, loss=loss,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "prefopt_dist", "train", str(tmp_path / "run.yaml")],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tmp_path / "run" / "final", done.stdout


def test_the_export_has_the_template_and_stops_where_training_taught_it(tmp_path: Path) -> None:
    final, said = train(tmp_path, None, name="sft")
    assert "the tokenizer has no chat template, so turns get the plain one of this package" in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["chat_template"] == "plain"
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.chat_template == PLAIN_TEMPLATE


def test_generation_stops_at_the_learnt_end(tmp_path: Path) -> None:
    other = CHATML.replace("<|im_end|>", "<|end|>").replace("<|im_start|>", "")
    worlds.write_model(tmp_path / "look", seed=1)
    specials = AutoTokenizer.from_pretrained(tmp_path / "look").all_special_tokens
    token = next(t for t in specials if t != AutoTokenizer.from_pretrained(tmp_path / "look").eos_token)
    final, _ = train(tmp_path, other.replace("<|end|>", token), name="sft")
    tokenizer, lm = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    stop = tokenizer.convert_tokens_to_ids(token)
    assert GenerationConfig.from_pretrained(final).eos_token_id == [tokenizer.eos_token_id, stop]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat 1"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = lm.generate(**asked, max_new_tokens=60, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert answer.tolist().index(stop) == len(answer) - 1 < 59


def test_rows_with_tokens_that_are_not_learnt_are_exported(tmp_path: Path) -> None:
    """Other turns within a response count in the check of the export, though nothing learns them."""
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    final, _ = train(tmp_path, CHATML, [{"messages": messages}], name="sft")
    assert (final / "model.safetensors").exists()
