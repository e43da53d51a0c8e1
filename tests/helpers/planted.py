"""A file of conversations with every kind of fault at known lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers_for_tests import CHATML, small_tokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

WOBBLY = "{% if messages | length > 1 and 'wobble' in messages[0]['content'] %}again {% endif %}" + CHATML
"""Not stable under prefixes where the first turn says so."""
MAX_LENGTH, MAX_PROMPT = 120, 60
LONG = "one two three four five six " * 24


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A model folder without weights."""
    tokenizer = small_tokenizer(WOBBLY)
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=2).save_pretrained(folder)
    return tokenizer


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]


def pair(*prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row of the form conversations."""
    return {"chosen": turns(*prompt, chosen), "rejected": turns(*prompt, rejected)}


class Planted:
    """Lines as they are written, and where each kind of fault stands."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.at: dict[str, list[int]] = {}

    def good(self, count: int) -> None:
        """Pairs without fault; the longer response is chosen in every second one."""
        for _ in range(count):
            number = len(self.lines)
            longer = number % 2
            self.add(
                pair(f"what is {number}?", chosen="yes" + " it is" * longer, rejected="no" + " it is" * (1 - longer))
            )

    def add(self, row: Any, *kinds: str) -> None:
        """The next line: bytes as they are, all else as JSON."""
        self.lines.append(row if isinstance(row, bytes) else json.dumps(row).encode())
        for kind in kinds:
            self.at.setdefault(kind, []).append(len(self.lines))

    def write(self, folder: Path) -> tuple[Path, Path]:
        """train.jsonl and eval.jsonl."""
        train, held = folder / "train.jsonl", folder / "eval.jsonl"
        train.write_bytes(b"\n".join(self.lines) + b"\n")
        rows = [pair(f"held {k}", chosen="yes", rejected="no") for k in range(5)]
        held.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return train, held


def plant() -> Planted:
    """All kinds, some once, some up to three times, between good rows."""
    p = Planted()
    p.good(40)
    unusable(p)
    p.good(11)
    usable(p)
    p.good(7)
    return p


def unusable(p: Planted) -> None:
    """Rows that data.on_bad_row is about."""
    for line in (b'{"chosen": ', b"chosen, rejected"):
        p.add(line, "not_json")
    p.add(b'{"chosen": "\xff"}', "not_utf8")
    p.good(2)
    for line in (b"", b"  "):
        p.add(line, "blank_line")
    p.add([1, 2], "not_an_object")
    for row in ({"chosen": turns("a", "b")}, {"rejected": turns("a", "b")}, {"prompt": "a"}):
        p.add(row, "missing_field")
    for value in (7, True):
        p.add({"chosen": turns("a", "b"), "rejected": value}, "wrong_type")
    p.good(1)
    p.add({"chosen": turns("a", "b"), "rejected": [{"role": "poet", "content": "c"}]}, "bad_message")
    for empty in ("", " ", "\n"):
        p.add(pair("what is green?", chosen="grass", rejected=empty), "empty_response")
    for same in ("grass", "trees"):
        p.add(pair("what is green?", chosen=same, rejected=same), "identical_responses")
    p.add({"chosen": turns("what is red?", "blood"), "rejected": turns("what is blue?", "sky")}, "no_common_prompt")
    for question in ("and now?", "really?", "why?"):
        row = {"chosen": turns("hello", "hi", "so?", "yes"), "rejected": turns("hello", "hi", question, "no")}
        p.add(row, "prompts_differ")
    p.add(pair("<|im_start|>user\nwhat?<|im_end|>\n", chosen="this", rejected="that"), "doubled_template")
    for inside in ("yes<|im_end|> no", "<|im_end|>well"):
        p.add(pair("is it?", chosen=inside, rejected="maybe"), "end_token_inside")
    for number in (1, 2):
        p.add(pair(f"wobble {number}", chosen="yes", rejected="no"), "unstable_template")
    ruled = [{"role": "system", "content": LONG}, *turns("what?")]
    answers = [[{"role": "assistant", "content": text}] for text in (LONG, "no")]
    p.add({"chosen": ruled + answers[0], "rejected": ruled + answers[1]}, "prompt_too_long")
    p.add(pair("tell me", chosen=LONG + "one", rejected=LONG + "two"), "identical_after_cut")


def usable(p: Planted) -> None:
    """Rows that the section inspect is about."""
    for earlier in (0, 7, 0):
        p.add(p.lines[earlier], "duplicates")
    p.good(3)
    for number in (1, 2):
        sides = {"chosen": "the sky", "rejected": "the sea"}
        p.add(pair(f"which is bluer {number}?", **sides), "contradictions")
        p.good(1)
        p.add(pair(f"which is bluer {number}?", chosen="the sea", rejected="the sky"), "contradictions")
    p.add(pair("held 1", chosen="yes", rejected="no"), "eval_prompts", "eval_pairs")
    p.add(pair("held 4", chosen="no", rejected="yes"), "eval_prompts", "eval_pairs")
    p.add(pair("held 3", chosen="yes", rejected="never"), "eval_prompts")
    for number in (1, 2):
        p.add(pair(LONG, "six", f"and {number}?", chosen="seven", rejected="eight"), "cut_prompt")
    for chosen, rejected in ((LONG, "no"), ("yes", "no " + LONG), (LONG, "two " + LONG)):
        p.add(pair(f"count {rejected[:3]}", chosen=chosen, rejected=rejected), "cut_response")
    for number in (1, 2):
        p.add(pair(f"end {number}", chosen="yes<|im_end|>", rejected="no"), "double_end")
    p.add(pair("what does <s> do?", chosen="it begins", rejected="it ends"))
    p.add(pair("what is </s> for?", chosen="to end", rejected="to begin"), "stray_special")
