"""Configuration: types and rules of its keys, and of keys that need each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_texts import MINIMAL, complaint, load

from prefopt_dist.config import DataSource
from prefopt_dist.errors import UserError


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


def test_a_policy_about_evaluation_needs_evaluation(tmp_path: Path) -> None:
    for policy in ("drop", "stop"):
        with pytest.raises(UserError, match=rf"^inspect\.eval_pairs: got {policy}, but data\.eval is null.*keep$"):
            load(tmp_path, f"inspect.eval_pairs={policy}")
    load(tmp_path, "inspect.eval_pairs=drop", "data.eval=e")


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
