"""Configuration: defaults, strictness, layers, round trip, identity, secrets, DeepSpeed's JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from places import REPOSITORY

from prefopt_dist.config import (
    LOSSES,
    Config,
    DataSource,
    DPOLoss,
    MixLoss,
    SFTLoss,
    differing_keys,
    identity,
    load_config,
    load_deepspeed_json,
    mask_secrets,
    to_dict,
    to_yaml,
)
from prefopt_dist.config.losses import IPOLoss, MixedLoss, ORPOLoss
from prefopt_dist.config.strict_yaml import dump_yaml, load_yaml, parse_value
from prefopt_dist.errors import UserError

MINIMAL = "run: {dir: runs/a}\nmodel: {name_or_path: some/model}\ndata: {train: rows.jsonl}\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def load(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> Config:
    return load_config(write(tmp_path / "run.yaml", text), overrides)


def complaint(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, text=text)
    return str(caught.value)


# Defaults


DEFAULTS: dict[str, Any] = {
    "run": {"dir": "runs/a", "seed": 0, "cache": None},
    "model": {
        "name_or_path": "some/model",
        "tokenizer": None,
        "dtype": "bfloat16",
        "checkpointing": "auto",
        "path": "auto",
        "compile": "auto",
    },
    "data": {
        "train": [{"path": "rows.jsonl", "split": None, "weight": 1.0, "name": None, "share": None}],
        "eval": None,
        "format": "auto",
        "template": "auto",
        "template_date": "2024-07-26",
        "learn": "all",
        "system": "keep",
        "thinking": None,
        "chat_template": None,
        "template_kwargs": None,
        "columns": None,
        "pairs_from": None,
        "weight": None,
        "margin": None,
        "max_length": 1024,
        "max_prompt_length": 512,
        "on_bad_row": "stop",
    },
    "reference": {
        "name_or_path": None,
        "store": None,
        "offload": "none",
        "micro_batch_tokens": None,
        "update_every_steps": None,
    },
    "lora": None,
    "loss": {
        "name": "dpo",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "average": "sums",
        "divergence": "reverse_kl",
        "divergence_alpha": 0.5,
        "ld_alpha": 1.0,
        "wpo": False,
        "sft_weight": 0.0,
    },
    "optim": {
        "learning_rate": 5e-7,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
    },
    "train": {
        "epochs": 1,
        "max_steps": None,
        "global_batch_pairs": 64,
        "micro_batch_tokens": 8192,
        "sequence_parallel": 1,
        "deterministic": False,
        "router_aux_loss_coef": 0.0,
        "on_spike": "none",
        "spike_factor": 10.0,
        "max_skipped_steps": 3,
        "early_stop": None,
        "max_hours": None,
        "hang_minutes": 30.0,
    },
    "eval": {"every_steps": 100, "at_start": True, "at_end": True},
    "checkpoint": {"every_steps": 100, "keep": 2, "keep_best": None, "resume": "auto"},
    "tracking": {
        "wandb": {"mode": "online", "project": "prefopt", "name": None, "group": None, "tags": []},
        "log_every_steps": 1,
        "tensorboard": False,
    },
    "answers": {"prompts": None, "number": 64, "max_new_tokens": None, "temperature": 1.0, "every": None},
    "health": {
        "grace": 0.333,
        "stuck_accuracy": 0.6,
        "wrong_margin": 0.8,
        "flipped_accuracy": 0.35,
        "chosen_fall": 0.5,
        "displacement": 1.25,
        "overfit_rise": 0.1,
        "length_correlation": 0.6,
        "divergence": 1.25,
        "gradient_spike": 10.0,
        "slow_rank": 1.5,
        "memory_growth": 0.05,
        "collapse_excess": 0.35,
        "collapse_moved": 0.3,
        "collapse_own": 1.25,
        "collapse_loops": 0.2,
        "longer_answers": 1.5,
        "unended_answers": 0.2,
    },
    "deepspeed": {
        "policy": "deepspeed_configs/policy_zero3.json",
        "reference": "deepspeed_configs/reference_zero3.json",
    },
    "export": {"dir": None, "checkpoint": None, "dtype": None, "merged": False, "push_to_hub": None},
    "evaluate": {"model": None, "prompts": None, "against": None, "samples": 1, "temperature": 1.0},
    "plan": {"gpu": None, "nodes": 1, "gpus_per_node": None, "file": None},
    "report": {"compare": [], "file": None},
    "inspect": {
        **dict.fromkeys(
            "duplicates contradictions eval_pairs eval_prompts cut special_tokens".split()
            + "other_prompt lost_reasoning".split()
            + "length_bias label_balance few_rows".split(),
            "keep",
        ),
        "show": 0,
        "file": None,
        "picture": None,
    },
    "generate": {
        "rewards": [],
        "prompts": None,
        "n": 8,
        "temperature": 0.9,
        "top_p": 1.0,
        "max_new_tokens": 256,
        "batch_tokens": 32768,
        "pairing": "best_worst",
        "min_margin": 0.0,
        "on_bad_reward": "stop",
        "engine": "transformers",
        "servers": [],
        "launch": None,
        "key_variable": None,
        "requests_in_flight": 64,
        "request_seconds": 600.0,
        "pairs": None,
    },
    "rounds": {"count": 3, "reference": "start", "prompts_per_round": None, "ahead": 0},
}
"""The configuration of `MINIMAL`, as the pages say it."""


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    assert to_dict(load(tmp_path)) == DEFAULTS


def test_what_the_nulls_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFOPT_CACHE", raising=False)
    config = load(tmp_path)
    assert config.cache_dir == Path("runs/.prefopt")
    assert config.reference_store == Path("runs/.prefopt/reference")
    assert config.reference_micro_batch_tokens == 16384
    assert config.tokenizer == "some/model"
    assert config.export_dir == Path("runs/a/final")
    monkeypatch.setenv("PREFOPT_CACHE", "/shared/cache")
    assert config.reference_store == Path("/shared/cache/reference")
    given = load(tmp_path, "run.cache=c", "reference.store=s", "reference.micro_batch_tokens=7", "export.dir=e")
    assert given.cache_dir == Path("c")
    assert given.reference_store == Path("s")
    assert given.reference_micro_batch_tokens == 7
    assert given.export_dir == Path("e")


# Types and rules


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("los.x=1", ["los:", "unknown key", "loss"]),
        ("train.epochz=3", ["train.epochz", "unknown key", "epochs"]),
        ("tracking.wandb.mod=x", ["tracking.wandb.mod", "mode"]),
        ("data.train={path: a, wieght: 2}", ["data.train.wieght", "weight"]),
        ("train.epochs=3.0", ["train.epochs", "3.0", "whole number"]),
        ("train.epochs=1e1", ["train.epochs", "10.0", "whole number"]),
        ("train.epochs=true", ["train.epochs", "true", "whole number"]),
        ("train.epochs='1'", ["train.epochs", "'1'", "whole number"]),
        ("train.epochs=0", ["train.epochs", "at least 1"]),
        ("train.max_steps=0", ["train.max_steps", "at least 1"]),
        ("train.max_hours=0", ["train.max_hours", "greater than 0"]),
        ("train.global_batch_pairs=null", ["train.global_batch_pairs", "null"]),
        ("optim.learning_rate=.nan", ["optim.learning_rate", "nan", "finite"]),
        ("optim.learning_rate=.inf", ["optim.learning_rate", "inf", "finite"]),
        ("optim.learning_rate=1e999", ["optim.learning_rate", "inf", "finite"]),
        ("optim.learning_rate=true", ["optim.learning_rate", "true", "number"]),
        ("optim.learning_rate='5e-7'", ["optim.learning_rate", "'5e-7'", "without quotes"]),
        ("optim.learning_rate=0", ["optim.learning_rate", "greater than 0"]),
        ("optim.weight_decay=9007199254740993", ["optim.weight_decay", "not rounded"]),
        (f"optim.weight_decay={'9' * 400}", ["optim.weight_decay", "not rounded"]),
        ("optim.weight_decay=-0.1", ["optim.weight_decay", "at least 0"]),
        ("optim.warmup_ratio=1", ["optim.warmup_ratio", "[0, 1)"]),
        ("optim.max_grad_norm=0", ["optim.max_grad_norm", "greater than 0"]),
        ("optim.betas=[0.9]", ["optim.betas", "list of 2"]),
        ("optim.betas=[0.9, 1]", ["optim.betas[1]", "[0, 1)"]),
        ("optim.schedule=step", ["optim.schedule", "linear, cosine, constant"]),
        ("model.dtype=float16", ["model.dtype", "float32, bfloat16"]),
        ("eval.at_start=yes", ["eval.at_start", "'yes'", "true or false"]),
        ("eval.at_start=1", ["eval.at_start", "true or false"]),
        ("run.dir=7", ["run.dir", "7", "string"]),
        ("run.dir=", ["run.dir", "null", "string"]),
        ("run.dir='  '", ["run.dir", "not empty"]),
        ("run.seed=-1", ["run.seed", "[0, 2**32)"]),
        ("run.seed=4294967296", ["run.seed", "[0, 2**32)"]),
        ("checkpoint.keep=1", ["checkpoint.keep", "at least 2"]),
        ("data.max_length=1", ["data.max_length", "at least 2"]),
        ("data.max_prompt_length=1024", ["data.max_prompt_length", "less than data.max_length"]),
        ("data.train=[]", ["data.train", "at least one"]),
        ("data.train={split: a}", ["data.train.path", "missing"]),
        ("data.train=[{path: a}, {path: b, weight: 0}]", ["data.train[1].weight", "greater than 0"]),
        ("data.eval={}", ["data.eval", "named sets"]),
        ("data.train=[{path: a, share: 1}, b]", ["data.train[1].share", "missing"]),
        ("data.train={path: a, share: 1, weight: 2}", ["data.train[0].weight", "got 2 beside share 1"]),
        ("data.eval={weight: 2.0}", ["data.eval", "weight"]),
        ("data.eval={a/b: x}", ["data.eval.a/b", "letters"]),
        ("data.eval={a: 1}", ["data.eval.a", "path"]),
        ("tracking.wandb.tags=a", ["tracking.wandb.tags", "list"]),
        ("tracking.wandb=offline", ["tracking.wandb", "mapping"]),
        (
            "loss.name=opi",
            [
                "loss.name",
                "'opi'",
                "dpo, robust, ipo, hinge, exo_pair, ",
                "simpo, alphapo, cpo, orpo, aot, aot_unpaired, kto, sft",
            ],
        ),
        ("loss.name=[dpo]", ["loss.name", "dpo, robust"]),
        ("loss.beta=0", ["loss.beta", "greater than 0"]),
        ("loss.label_smoothing=0.5", ["loss.label_smoothing", "[0, 0.5)"]),
        ("loss.bata=1", ["loss.bata", "unknown key", "beta"]),
        ("loss.average=words", ["loss.average", "'words'", "one of sums, tokens"]),
        ("loss.sft_weight=-1", ["loss.sft_weight", "got -1", "at least 0"]),
    ],
)
def test_mistakes_name_key_value_and_rule(tmp_path: Path, override: str, words: list[str]) -> None:
    message = complaint(tmp_path, override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("section", "key"), [("run", "run.dir"), ("model", "model.name_or_path"), ("data", "data.train")]
)
def test_a_missing_required_key_is_named(tmp_path: Path, section: str, key: str) -> None:
    text = "".join(line + "\n" for line in MINIMAL.splitlines() if not line.startswith(section))
    assert f"{key}: missing" in complaint(tmp_path, text=text)


def test_an_emptied_section_is_not_taken_for_its_defaults(tmp_path: Path) -> None:
    assert "optim: got null" in complaint(tmp_path, text=MINIMAL + "optim:\n")
    assert "loss: got 'dpo'" in complaint(tmp_path, text=MINIMAL + "loss: dpo\n")


@pytest.mark.parametrize(("override", "value"), [("5e-7", 5e-7), ("1E5", 1e5), ("1", 1.0), (".5", 0.5), ("+2.", 2.0)])
def test_numbers_as_people_write_them(tmp_path: Path, override: str, value: float) -> None:
    learning_rate = load(tmp_path, f"optim.learning_rate={override}").optim.learning_rate
    assert learning_rate == value
    assert isinstance(learning_rate, float)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a", (DataSource("a"),)),
        ("{path: a, weight: 2}", (DataSource("a", None, 2.0),)),
        ("[a, {path: b, split: s, weight: 0.5}]", (DataSource("a"), DataSource("b", "s", 0.5))),
    ],
)
def test_data_sources(tmp_path: Path, override: str, expected: tuple[DataSource, ...]) -> None:
    config = load(tmp_path, f"data.train={override}", f"data.eval={override}")
    assert config.data.train == expected
    assert config.data.eval == {"": expected}
    named = load(tmp_path, f"data.eval={{one: {override}, two.b: c}}").data.eval
    assert named == {"one": expected, "two.b": (DataSource("c"),)}


def test_losses(tmp_path: Path) -> None:
    assert load(tmp_path).loss == DPOLoss()
    assert load(tmp_path, "loss.name=sft").loss == SFTLoss()
    message = complaint(tmp_path, "loss.name=sft", "loss.beta=0.1")
    assert "loss.beta" in message
    assert "dpo, robust, ipo, hinge, exo_pair, " in message
    assert "simpo, alphapo, cpo, orpo, aot, aot_unpaired, kto have it" in message
    assert all(cls().name == name for name, cls in LOSSES.items())


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        ("robust", "label_smoothing", "0.5", ["loss.label_smoothing", "got 0.5", "[0, 0.5)"]),
        ("ipo", "beta", "0", ["loss.beta", "got 0", "greater than 0"]),
        ("ipo", "average", "true", ["loss.average", "got true", "one of tokens, sums"]),
        ("hinge", "beta", "-1.0", ["loss.beta", "got -1.0", "greater than 0"]),
        ("kto", "desirable_weight", "0", ["loss.desirable_weight", "got 0", "greater than 0"]),
        ("kto", "split_pairs", "1", ["loss.split_pairs", "got 1", "true or false"]),
        ("simpo", "gamma", "-0.5", ["loss.gamma", "got -0.5", "at least 0"]),
        ("orpo", "beta", "inf", ["loss.beta", "'inf'", "number"]),
        ("exo_pair", "label_smoothing", "0", ["loss.label_smoothing", "got 0", "(0, 0.5)"]),
        ("discopop", "temperature", "1.5", ["loss.temperature", "got 1.5", "(0, 1]"]),
        ("dpop", "penalty", "0", ["loss.penalty", "got 0", "greater than 0"]),
        (
            "dpo",
            "divergence",
            "kl",
            ["loss.divergence", "'kl'", "one of reverse_kl, forward_kl, jensen_shannon, alpha"],
        ),
        ("dpo", "ld_alpha", "1.5", ["loss.ld_alpha", "got 1.5", "in [0, 1]"]),
        ("dpo", "divergence_alpha", "1", ["loss.divergence_alpha", "got 1", "(0, 1)"]),
        ("dpo", "divergence_alpha", "0.3", ["divergence_alpha", "got 0.3", "reverse_kl, which has no α"]),
        ("alphapo", "alpha", "0", ["loss.alpha", "got 0", "different from 0"]),
        ("apo_zero", "penalty", "1", ["loss.penalty", "not an option of the loss apo_zero; dpop has it"]),
    ],
)
def test_a_bad_value_of_a_loss_names_key_value_and_rule(
    tmp_path: Path, name: str, option: str, value: str, words: list[str]
) -> None:
    message = complaint(tmp_path, f"loss.name={name}", f"loss.{option}={value}")
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", LOSSES)
def test_an_option_of_another_loss_is_refused(tmp_path: Path, name: str) -> None:
    """For each option of the family: taken by the losses that have it, refused with their names by the others."""
    given = {
        "beta": "0.3",
        "label_smoothing": "0.2",
        "average": "tokens",
        "sft_weight": "0.5",
        "gamma": "0.4",
        "desirable_weight": "1.5",
        "undesirable_weight": "0.5",
        "split_pairs": "true",
        "reference_point": "zero",
        "temperature": "0.3",
        "divergence": "alpha",
        "divergence_alpha": "0.5",
        "ld_alpha": "0.5",
        "wpo": "true",
        "penalty": "3.0",
        "alpha": "0.3",
    }
    fields = {loss: {f.name for f in dataclasses.fields(cls)} - {"name"} for loss, cls in LOSSES.items()}
    assert set().union(*fields.values()) == set(given)
    for option, value in given.items():
        overrides = (f"loss.name={name}", f"loss.{option}={value}")
        if option in fields[name]:
            assert str(getattr(load(tmp_path, *overrides).loss, option)).lower() == value
        else:
            message = complaint(tmp_path, *overrides)
            owners = ", ".join(loss for loss in LOSSES if option in fields[loss])
            for word in (f"loss.{option}", f"not an option of the loss {name}", f"{owners} ha"):
                assert word in message


MIX = MINIMAL + "loss: {name: mix, of: {orpo: {weight: 0.2}, dpo: {weight: 1, beta: 0.3}}}\n"


def test_a_mix(tmp_path: Path) -> None:
    """Each part with its own options, over layers and by dotted override; the order of the file decides nothing."""
    loss = load(tmp_path, text=MIX).loss
    assert loss == MixLoss({"dpo": MixedLoss(1.0, DPOLoss(beta=0.3)), "orpo": MixedLoss(0.2, ORPOLoss())})
    assert list(loss.of) == ["dpo", "orpo"]
    changed = load(tmp_path, "loss.of.dpo.beta=0.5", "loss.of.sft.weight=0.1", text=MIX)
    assert changed.loss.of["dpo"].loss.beta == 0.5
    assert changed.loss.of["sft"] == MixedLoss(0.1, SFTLoss())
    assert load(tmp_path, text=to_yaml(changed)) == changed
    differ = differing_keys(identity(load(tmp_path, text=MIX)), identity(changed))
    assert differ[0] == "loss.of.dpo.beta: was 0.3, now 0.5"
    assert "loss.of.sft.weight: was absent, now 0.1" in differ
    assert load(tmp_path, "loss.name=ipo", text=MIX).loss == IPOLoss()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "loss.of.dpo.gamma=1",
            ["loss.of.dpo.gamma", "got 1", "not an option of the loss dpo; simpo, alphapo have it"],
        ),
        ("loss.of.dpo.bata=1", ["loss.of.dpo.bata", "unknown key", "beta"]),
        ("loss.of.dpo.beta=0", ["loss.of.dpo.beta", "got 0", "greater than 0"]),
        ("loss.of.dpo.weight=0", ["loss.of.dpo.weight", "got 0", "greater than 0"]),
        ("loss.of.dpo.weight=true", ["loss.of.dpo.weight", "got true", "a number"]),
        ("loss.of.dpo.name=ipo", ["loss.of.dpo.name", "the key names the loss"]),
        ("loss.of.dpo.sft_weight=1", ["loss.of.dpo.sft_weight", "got 1", "sft: {weight: …}"]),
        ("loss.of.dpo=3", ["loss.of.dpo", "got 3", "a mapping of its weight and options"]),
        ("loss.of.sft={}", ["loss.of.sft.weight", "missing", "loss.of.sft.weight=VALUE"]),
        ("loss.of.kto.weight=1", ["loss.of.kto", "cannot be mixed", "single responses"]),
        ("loss.of.mix.weight=1", ["loss.of.mix", "cannot be mixed"]),
        ("loss.of.dop.weight=1", ["loss.of.dop", "'dop'", "one of dpo, robust"]),
        ("loss.of=[dpo, orpo]", ["loss.of", "a mapping of two losses or more"]),
        ("loss.of=null", ["loss.of", "got null", "a mapping of two losses or more", "{dpo: {weight: 1"]),
        ("loss.beta=0.1", ["loss.beta", "got 0.1", "loss.of.LOSS.beta"]),
        ("loss.off=1", ["loss.off", "unknown key", "did you mean of?"]),
    ],
)
def test_a_mistake_in_a_mix(tmp_path: Path, override: str, words: list[str]) -> None:
    message = complaint(tmp_path, override, text=MIX)
    for word in words:
        assert word in message


def test_a_mix_without_its_name(tmp_path: Path) -> None:
    message = complaint(tmp_path, "loss.of.dpo.weight=1")
    assert "loss.of" in message
    assert "set loss.name=mix" in message
    one = complaint(tmp_path, "loss.name=mix", "loss.of.dpo.weight=1")
    assert "two losses or more" in one


@pytest.mark.parametrize("name", ["losses", "from-other-tools"])
def test_the_pages_on_losses_and_other_tools_name_keys_that_exist(tmp_path: Path, name: str) -> None:
    """The second translates the names of other tools to ours."""
    page = (REPOSITORY / "docs" / f"{name}.md").read_text()
    sections = "|".join(field.name for field in dataclasses.fields(Config))
    keys = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)", page))
    options = {f"loss.{field.name}" for cls in LOSSES.values() for field in dataclasses.fields(cls)}
    options |= {"loss.of"} | {key.replace("loss.", "loss.of.dpo.") for key in options} | {"loss.of.LOSS."}
    known = to_dict(load(tmp_path, "lora.r=16"))
    for key in keys - options:
        place: Any = known
        for part in key.rstrip(".").split("."):
            assert part in place, key
            place = place[part]
    named = set(re.findall(r"`loss\.name[:=] ?([a-z_]+)", page))
    assert named <= {*LOSSES, "mix"}
    if name == "from-other-tools":
        assert {"dpo", "kto", "mix"} <= named
    else:
        table = page.split("## The losses")[1].split("\n## ")[0]
        assert re.findall(r"^\| `([a-z_]+)`", table, re.MULTILINE) == [*LOSSES, "mix"]


# Layers


def test_layers_go_over_each_other(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(
        tmp_path / "inner" / "root.yaml",
        MINIMAL + "optim: {learning_rate: 1.0, eps: 1e-6, weight_decay: 1}\n",
    )
    write(tmp_path / "inner" / "middle.yaml", "base: root.yaml\noptim: {learning_rate: 2.0, eps: 1e-7}\n")
    text = "base: inner/middle.yaml\noptim: {learning_rate: 3.0}\n"
    optim = load(tmp_path, "optim.learning_rate=4", "optim.learning_rate=5", text=text).optim
    assert (optim.learning_rate, optim.eps, optim.weight_decay, optim.warmup_ratio) == (5.0, 1e-7, 1.0, 0.1)


def test_sources_and_another_loss_replace_what_is_below(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL.replace("rows.jsonl", "{path: a, weight: 3}") + "loss: {beta: 0.3}\n")
    text = "base: base.yaml\ndata: {train: {path: b}}\n"
    config = load(tmp_path, "loss.label_smoothing=0.1", text=text)
    assert config.data.train == (DataSource("b"),)
    assert config.loss == DPOLoss(beta=0.3, label_smoothing=0.1)
    assert load(tmp_path, "loss.name=sft", text=text).loss == SFTLoss()


def test_a_cycle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "other.yaml", "base: run.yaml\n")
    assert "cycle" in complaint(tmp_path, text="base: other.yaml\n")
    assert "cycle" in complaint(tmp_path, text="base: ./run.yaml\n")
    assert "does not exist" in complaint(tmp_path, text="base: none.yaml\n")
    assert "base" in complaint(tmp_path, text="base: 3\n")


@pytest.mark.parametrize("override", ["x=1", "run.seed", "run.seed =1", "=1", "run..seed=1", ".seed=1", "--check"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    assert "section.key=value" in complaint(tmp_path, override)


def test_overrides_reach_deep_and_may_not_contradict(tmp_path: Path) -> None:
    config = load(tmp_path, "tracking.wandb.mode=offline", "optim.max_grad_norm=null", "run.cache=a=b")
    assert config.tracking.wandb.mode == "offline"
    assert config.optim.max_grad_norm is None
    assert config.run.cache == "a=b"
    assert "run.seed.x=1" in complaint(tmp_path, "run.seed=1", "run.seed.x=1")
    assert "quote" not in complaint(tmp_path, "run.dir=a: b: c")


# YAML


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("run: {dir: a}\nrun: {dir: b}\n", 2, "'run' stands twice"),
        ("run:\n  dir: a\n  seed: 1\n  dir: b\n", 4, "'dir' stands twice"),
        ("run:\n  dir: [a\n", 3, ""),
        ("run: {dir: a}\n\t- b\n", 2, ""),
        ("run: {1: a}\n", 1, "not a string"),
        ("a\n", 1, "mapping"),
        ("- a\n", 1, "mapping"),
        ("", 1, "nothing"),
        ("run: {dir: a}\n---\nrun: {dir: b}\n", 2, ""),
        ("run: {dir: !!python/name:os.system x}\n", 1, "constructor"),
        ("run: &x {dir: *x}\n", 1, "recursive"),
        ("run: {dir: *x}\n", 1, "alias"),
        ("a: 1\nrun: \x01\n", 2, "character"),
    ],
)
def test_yaml_mistakes_name_file_and_line(tmp_path: Path, text: str, line: int, word: str) -> None:
    message = complaint(tmp_path, text=text)
    assert message.startswith(f"{tmp_path / 'run.yaml'}:{line}:")
    assert word in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: 1\nb: é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml:2: .*UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("010", 10),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e5", 1e5),
        ("-1.5E-3", -1.5e-3),
        ("1e", "1e"),
        (".", "."),
        ("3", 3),
        ("a\u00a0é", "a\u00a0é"),
    ],
)
def test_scalars_and_their_way_back(tmp_path: Path, text: str, value: Any) -> None:
    parsed = parse_value(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)
    for stored in (value, text):  # the text as a string must come back as a string
        again = load_yaml(write(tmp_path / "back.yaml", dump_yaml({"key": stored})))["key"]
        assert again == stored
        assert type(again) is type(stored)


# Round trip and identity


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["loss.name=sft", "data.eval=[a, {path: b, split: '1e5'}]"],
        ["lora.target_modules=[q_proj, 'no']", "lora.rslora=true", "export.merged=true"],
        ["data.eval={x: a, y: [b, {path: c, weight: 0.25}]}", "tracking.wandb.tags=['no', '1', 'é']"],
        ["optim.learning_rate=1E-300", "optim.max_grad_norm=null", "run.dir='null'", "run.seed=4294967295"],
        [f"model.name_or_path=hub/snapshots/{'0123456789' * 4}", "model.tokenizer=hf_models/x"],
    ],
)
def test_resolved_text_loads_back_equal(tmp_path: Path, overrides: list[str]) -> None:
    config = load(tmp_path, *overrides)
    assert load(tmp_path, text=to_yaml(config)) == config


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.seed=1", "run.seed: was 0, now 1"),
        ("model.dtype=float32", "model.dtype: was bfloat16, now float32"),
        ("reference.name_or_path=r", "reference.name_or_path: was None, now r"),
        ("data.train=b", "data.train[0].path: was rows.jsonl, now b"),
        ("data.max_length=999", "data.max_length: was 1024, now 999"),
        ("loss.beta=0.2", "loss.beta: was 0.1, now 0.2"),
        ("loss.name=sft", "loss.label_smoothing: was 0.0, now absent"),
        ("optim.betas=[0.9, 0.95]", "optim.betas: was [0.9, 0.999], now [0.9, 0.95]"),
        ("train.global_batch_pairs=8", "train.global_batch_pairs: was 64, now 8"),
        ("train.epochs=2", "train.epochs: was 1, now 2"),
        ("train.max_steps=2", "train.max_steps: was None, now 2"),
        ("train.deterministic=true", "train.deterministic: was absent, now True"),
        ("data.weight=w", "data.weight: was absent, now w"),
        ("data.margin=a - b", "data.margin: was absent, now a - b"),
        ("lora.r=8", "lora.r: was absent, now 8"),
        ("lora.target_modules=[q_proj]", "lora.target_modules: was absent, now ['q_proj']"),
        ("inspect.duplicates=drop", "inspect.duplicates: was absent, now drop"),
    ],
)
def test_identity_holds_what_a_run_is(tmp_path: Path, override: str, line: str) -> None:
    before = json.loads(json.dumps(identity(load(tmp_path))))  # as it comes back from run.json
    assert line in differing_keys(before, identity(load(tmp_path, override)))


def test_identity_leaves_out_what_may_change(tmp_path: Path) -> None:
    changed = [
        "run.dir=b", "run.cache=c", "reference.store=s", "reference.offload=cpu", "model.checkpointing=all",
        "data.eval=e", "train.micro_batch_tokens=1", "train.max_hours=1", "train.hang_minutes=9", "deepspeed.policy=p",
        "eval.every_steps=3", "checkpoint.every_steps=null", "tracking.log_every_steps=2",
        "reference.micro_batch_tokens=3", "export.dir=d", "evaluate.model=m",
        "inspect.duplicates=stop", "inspect.file=f", "inspect.picture=p.png",
    ]  # fmt: skip
    assert differing_keys(identity(load(tmp_path)), identity(load(tmp_path, *changed))) == []


def test_later_options_of_a_loss_are_no_part_of_the_identity_at_their_defaults(tmp_path: Path) -> None:
    """A run folder that was begun before they existed resumes."""
    assert [key for key in identity(load(tmp_path)) if key.startswith("loss.")] == [
        *("loss.name", "loss.beta", "loss.label_smoothing", "loss.average", "loss.sft_weight")
    ]
    mix = identity(load(tmp_path, "loss.name=mix", "loss.of={dpo: {weight: 1}, ipo: {weight: 1}}"))
    assert not any("divergence" in key for key in mix)
    assert "loss.reference_point" not in identity(load(tmp_path, "loss.name=kto"))
    changed = load(tmp_path, "loss.divergence=forward_kl")
    assert differing_keys(identity(load(tmp_path)), identity(changed)) == [
        "loss.divergence: was absent, now forward_kl"
    ]


def test_a_policy_about_evaluation_needs_evaluation(tmp_path: Path) -> None:
    for policy in ("drop", "stop"):
        with pytest.raises(UserError, match=rf"^inspect\.eval_pairs: got {policy}, but data\.eval is null.*keep$"):
            load(tmp_path, f"inspect.eval_pairs={policy}")
    load(tmp_path, "inspect.eval_pairs=drop", "data.eval=e")


def test_identity_has_what_decides_which_rows_are_dropped(tmp_path: Path) -> None:
    drop = "inspect.eval_prompts=drop"
    before, after = identity(load(tmp_path, drop, "data.eval=e")), identity(load(tmp_path, drop, "data.eval=f"))
    assert differing_keys(before, after) == ["data.eval[0].path: was e, now f"]


def test_a_margin_needs_a_loss_that_has_one(tmp_path: Path) -> None:
    for loss in ("kto", "sft", "orpo", "apo_zero"):
        message = complaint(tmp_path, f"loss.name={loss}", "data.margin=m")
        assert message.startswith(f"data.margin: got 'm', but the loss {loss} has no margin of rewards")
        assert "set loss.name to one of dpo, robust" in message
    message = complaint(tmp_path, "loss.name=aot", "data.weight=w")
    assert message.startswith("data.weight: got 'w', but the loss aot compares pairs by their ranks")
    load(tmp_path, "loss.name=hinge", "data.margin=m")
    parts = "loss.of={dpo: {weight: 1}, sft: {weight: 1}}"
    assert load(tmp_path, "loss.name=mix", parts, "data.margin=m").data.margin == "m"
    parts = "loss.of={apo_zero: {weight: 1}, sft: {weight: 1}}"
    assert "data.margin: got 'm', but the loss mix" in complaint(tmp_path, "loss.name=mix", parts, "data.margin=m")


# Secrets


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("see hf_" + "a1B2" * 8 + " there", "see *** there"),
        ("key " + "0123456789abcdef" * 2 + "01234567.", "key " + "0123456789abcdef" * 2 + "01234567."),
        ("0123456789abcdef" * 2 + "01234567", "***"),
        ("https://me:pass@host/x", "https://***@host/x"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=***&y=1"),
        ("WANDB_API_KEY=abc def", "WANDB_API_KEY=*** def"),
        ("value long-secret-value here", "value *** here"),
        (
            "micro_batch_tokens=8192 tokenizer=x max_tokens=3",
            "micro_batch_tokens=8192 tokenizer=x max_tokens=3",
        ),
        ("short is false", "short is false"),
        ("model.name_or_path: /models/base, /home/me/.token", "model.name_or_path: /models/base, /home/me/.token"),
    ],
)
def test_secrets_in_text(monkeypatch: pytest.MonkeyPatch, text: str, masked: str) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "long-secret-value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TOKENIZER_PATH", "/models/base")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/.token")
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked


def test_secrets_in_dicts_and_configs(tmp_path: Path) -> None:
    given = {"hf_token": "x", "a": [{"Password": "y", "tokens": 3}], "api_key": None, "tokenizer": "t"}
    assert mask_secrets(given) == {
        "hf_token": "***", "a": [{"Password": "***", "tokens": 3}], "api_key": None, "tokenizer": "t"
    }  # fmt: skip
    config = load(tmp_path, "data.train=https://me:pass@host/rows.jsonl")
    saved = load(tmp_path, text=to_yaml(config))
    assert "pass@" not in to_yaml(config)
    assert differing_keys(identity(saved), identity(config)) == []
    assert "pass@" not in complaint(tmp_path, "model.dtype=https://me:pass@host")


# DeepSpeed's JSON


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


@pytest.mark.parametrize(
    "text",
    [
        "? !!binary " + "runr" * 2000 + "\n: 1\n",
        "x" * 900 + ": 1\n",
        "? " + "x" * 900 + "\n: 1\n? " + "x" * 900 + "\n: 2\n",
    ],
)
def test_a_monstrous_key_is_shown_in_short(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert "xxx" in str(caught.value) or "is not a string" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_later_keys_of_adapters_at_their_defaults_are_not_part_of_a_run(tmp_path: Path) -> None:
    """So that runs of earlier versions resume; set, each is part of it, under its key in the file."""

    def of(**lora: object) -> dict[str, Any]:
        file = tmp_path / "run.yaml"
        sections = {"run": {"dir": "r"}, "model": {"name_or_path": "m"}, "data": {"train": "t"}, "lora": lora}
        file.write_text(json.dumps(sections))
        found = identity(load_config(file))
        return {key: value for key, value in found.items() if key.startswith("lora")}

    earlier = {"lora.r": 16, "lora.alpha": 32, "lora.rslora": False, "lora.target_modules": None}
    assert of() == earlier
    later = {"from": "folder", "dora": True, "experts": True, "base": "nf4", "modules_to_save": ["norm"]}
    assert of(**later) == earlier | {f"lora.{key}": value for key, value in later.items()}
