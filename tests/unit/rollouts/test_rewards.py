"""Rewards: functions and reward models, and what is refused as one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import rewards_for_tests
import torch
import worlds
from letters import score
from prompts_and_answers import CPU, FLOAT32, prompt
from reward_models import write_reward
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt_dist.data.template import read_template
from prefopt_dist.errors import UserError
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.rewards import ClassifierReward, FunctionReward, RewardFailure, find_function, inspect_reward


def test_functions_are_asked_with_prompt_response_and_row() -> None:
    asked = [(prompt(0, [1], hint="four"), "a house"), (prompt(1, [2]), "sky")]
    assert FunctionReward(rewards_for_tests.letters).score(asked) == [7.0, 3.0]
    assert FunctionReward(rewards_for_tests.same).score(asked) == [1.0, 1.0]
    assert FunctionReward(rewards_for_tests.raises).score(asked[:1]) == [
        RewardFailure("raised KeyError: 'no answer column'")
    ]
    assert FunctionReward(rewards_for_tests.nothing).score(asked) == [
        RewardFailure("returned nan, which is not finite"),
        RewardFailure("returned nan, which is not finite"),
    ]
    assert FunctionReward(rewards_for_tests.nothing).score([(asked[0][0], "ab")]) == [
        RewardFailure("returned None, which is not a number")
    ]
    huge = FunctionReward(lambda prompt, response, row: 10**400)
    assert huge.score(asked[:1]) == [
        RewardFailure("returned a number that is too large for a float, so it is not finite")
    ]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("rewards_for_tests", "must be module:name"),
        ("no_such_module:score", "cannot be imported (ModuleNotFoundError"),
        ("rewards_for_tests:letter", "did you mean letters?"),
        ("rewards_for_tests:CONSTANT", "is a int, must be a function"),
    ],
)
def test_a_function_that_is_not_there(path: str, words: str) -> None:
    with pytest.raises(UserError) as told:
        find_function(path, "generate.rewards[0].function")
    assert words in str(told.value)
    assert str(told.value).startswith("generate.rewards[0].function: ")


def test_a_function_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python itself does not look into the working folder, as in an image or under slurm/job.sh."""
    (tmp_path / "reward_of_this_folder.py").write_text("def score(prompt, response, row):\n    return len(response)\n")
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    assert find_function("reward_of_this_folder:score", "k")("", "four", {}) == 4
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize("pad", [True, False])
def test_a_reward_model_scores_as_in_plain_transformers(tmp_path: Path, pad: bool) -> None:
    folder = write_reward(tmp_path / "reward", pad=pad)
    template = read_template(AutoTokenizer.from_pretrained(folder), "auto")
    reward = ClassifierReward(
        inspect_reward(str(folder), "k"), template=template, dtype=FLOAT32, device=CPU, batch_tokens=200
    )
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Write to my boss."}]
    asked = [
        (Prompt(i, "p:1", question, None, {}, []), response)
        for i, question in enumerate(["Write to my friend Eve that the car is repaired.", turns, "Hey"])
        for response in ["", "Hey", "Dear boss Ada, the train is late. " * 5, "Good day<|end|>"]
    ]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for p, response in asked:
        said = [{"role": "user", "content": p.prompt}] if isinstance(p.prompt, str) else p.prompt
        inputs = tokenizer.apply_chat_template(
            [*said, {"role": "assistant", "content": response}], return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            expected.append(model(**inputs).logits[0, 0].item())
    assert len(set(expected)) == len(expected)
    assert reward.score(asked) == pytest.approx(expected, abs=2e-6)
    (long,) = reward.score([(asked[0][0], "word " * 600)])
    assert isinstance(long, RewardFailure)
    assert long.reason.startswith("takes at most 512 tokens, but prompt and response have ")
    carried = Prompt(0, "p:7", "<|user|>Hey<|end|><|assistant|>", None, {}, [])
    with pytest.raises(UserError, match="p:7: the prompt is already rendered"):
        reward.score([(carried, "Hey")])


def test_a_reward_model_that_is_none(tmp_path: Path) -> None:
    two = write_reward(tmp_path / "two", outputs=2)
    with pytest.raises(UserError, match=r"^k: .* has 2 outputs \(num_labels\), must have 1"):
        inspect_reward(str(two), "k")
    worlds.write_model(tmp_path / "lm")
    with pytest.raises(UserError, match="is a LlamaForCausalLM, must be a sequence classifier"):
        inspect_reward(str(tmp_path / "lm"), "k")
    silent = write_reward(tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        inspect_reward(str(silent), "k")
    headless = write_reward(tmp_path / "headless")
    torch_model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    config = (headless / "config.json").read_text()
    torch_model.save_pretrained(headless)
    (headless / "config.json").write_text(config)
    template = read_template(AutoTokenizer.from_pretrained(headless), "auto")
    with pytest.raises(UserError, match=r"lacks the weights score\.weight"):
        ClassifierReward(
            inspect_reward(str(headless), "k"), template=template, dtype=FLOAT32, device=CPU, batch_tokens=9
        )


def test_the_true_reward_of_the_world() -> None:
    asked = "Write to my boss Ada that the train is late."
    formal = "Good day boss Ada, please note that the train is late. Kind regards"
    casual = "Hi boss Ada, just so you know, the train is late. Cheers"
    assert [score(asked, text, {}) for text in (formal, casual, formal[:-8], casual[:-7] + " Kind regards")] == [
        1.0,
        0.5,
        0.25,
        0.25,
    ]
    assert score(asked, formal.replace("Ada", "Ben"), {}) == 0.5
    assert score([{"role": "user", "content": asked.replace("boss", "friend")}], "Hey friend Ada", {}) == 0.25
