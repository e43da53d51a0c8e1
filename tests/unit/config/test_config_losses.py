"""Configuration: the losses with their options, mixes, and the pages that name them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from config_texts import MINIMAL, complaint, load
from places import REPOSITORY

from prefopt_dist.config import LOSSES, Config, DPOLoss, MixLoss, SFTLoss, differing_keys, identity, to_dict, to_yaml
from prefopt_dist.config.losses import IPOLoss, MixedLoss, ORPOLoss


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
