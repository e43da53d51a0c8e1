"""Of several turns only what the assistant wrote is scored and learnt: in the data, the pack, the scorer."""

from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import torch
from data_for_tests import lines, prepare
from encoding import encode, fault, pair
from models_for_tests import apart, make, pairs
from tokenizers_for_tests import CHATML, small_tokenizer

from prefopt_dist.batching.packing import pack
from prefopt_dist.data import open_rows, sequence_digest
from prefopt_dist.data.derived import build_unpaired_rows, without_rows
from prefopt_dist.data.example import Message
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser
from prefopt_dist.data.unit import Unit, keyed_responses
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO

LAST = TextOptions(learn="last")
# Earlier turns end otherwise than the last one.
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}"
    "{{ '</s>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSIDE = (Message("assistant", "look"), Message("tool", "blue"), Message("assistant", "the sky is blue."))
OUTSIDE = (Message("assistant", "look twice"), Message("tool", "one two three"), Message("assistant", "green"))
ASKED = (Message("user", "what is the colour of the sky?"),)


def learnt(tokenizer: Any, row: TokenisedRow, k: int) -> list[str]:
    """Each run of learnt tokens, decoded."""
    mask = row.learnt_of(k) or [True] * len(row.responses[k])
    runs: list[list[int]] = []
    for j, (token, mine) in enumerate(zip(row.responses[k], mask, strict=True)):
        if mine and (j == 0 or not mask[j - 1]):
            runs.append([])
        if mine:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "ends"), [(CHATML, ("<|im_end|>", "<|im_end|>")), (TWO_ENDS, ("<|im_end|>", "</s>"))]
)
def test_only_the_assistants_words_are_learnt(template: str, ends: tuple[str, str]) -> None:
    tokenizer = small_tokenizer(template)
    row = encode(tokenizer, pair(ASKED, INSIDE, OUTSIDE))
    assert learnt(tokenizer, row, 0) == [f"look{ends[0]}", f"the sky is blue.{ends[1]}"]
    assert learnt(tokenizer, row, 1) == [f"look twice{ends[0]}", f"green{ends[1]}"]
    assert "one two three" in tokenizer.decode(row.responses[1])
    of = Tokeniser(read_template(tokenizer, "auto", LAST), 999, 99)
    (last,) = of.encode([pair(ASKED, INSIDE, OUTSIDE)])
    assert isinstance(last, TokenisedRow)
    assert last.responses == row.responses
    assert [learnt(tokenizer, last, k) for k in (0, 1)] == [[f"the sky is blue.{ends[1]}"], [f"green{ends[1]}"]]


def test_one_turn_has_no_mask() -> None:
    row = encode(small_tokenizer(CHATML), pair(ASKED, INSIDE[:1], OUTSIDE[:1]))
    assert row.learnt_of(0) is row.learnt_of(1) is None


def test_words_of_others_make_no_preference() -> None:
    tokenizer = small_tokenizer(CHATML)
    other = (INSIDE[0], Message("tool", "red"), INSIDE[2])
    assert fault(tokenizer, pair(ASKED, INSIDE, other)) == "identical_responses"
    row = encode(tokenizer, pair(ASKED, INSIDE, OUTSIDE))
    prompt, first = len(row.prompt), len(row.learnt[0] or []) - sum(row.learnt[0] or [])
    assert first > 3
    longer = (INSIDE[0], INSIDE[1], Message("assistant", "the sky is quick."))
    same = pair(ASKED, INSIDE, longer)
    assert fault(tokenizer, same, max_length=prompt + 9, max_prompt=prompt) == "identical_after_cut"
    cut = encode(tokenizer, pair(ASKED, INSIDE, OUTSIDE), max_length=prompt + 6, max_prompt=prompt)
    assert [len(mask or []) for mask in cut.learnt] == [6, 6]
    of = Tokeniser(read_template(tokenizer, "auto", LAST), prompt + 6, prompt)
    (bad,) = of.encode([pair(ASKED, INSIDE, OUTSIDE)])
    assert getattr(bad, "kind", None) == "nothing_learnt"


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


AGENT = {
    "prompt": turns(("user", "what is blue?")),
    "chosen": turns(("assistant", "look"), ("tool", "sky"), ("assistant", "the sky")),
    "rejected": turns(("assistant", "no"), ("tool", "grass grass grass"), ("assistant", "grass")),
}
PLAIN = {"prompt": "what is green?", "chosen": "grass", "rejected": "the sky"}


def test_the_mask_on_disk(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(CHATML)
    folder = prepare(tmp_path, lines(tmp_path / "r.jsonl", [AGENT, PLAIN]))
    rows = open_rows(folder)
    assert rows.learnt is not None
    mask = rows.mask(0, 0)
    assert mask is not None
    assert tokenizer.decode(rows.response(0, 0)[mask]) == "look<|im_end|>the sky<|im_end|>"
    assert rows.mask(1, 0) is rows.mask(1, 1) is None
    assert rows.learnt_lengths()[0].tolist() == [int(mask.sum()), int(np.count_nonzero(rows.mask(0, 1)))]
    assert rows.learnt_lengths()[1].tolist() == rows.lengths()[1, 1:].tolist()
    for i in (0, 1):
        for k in (0, 1):
            digest = sequence_digest(rows.prompt(i), rows.response(i, k), rows.mask(i, k))
            assert rows.digests[i, k].tobytes() == digest
            assert (digest == sequence_digest(rows.prompt(i), rows.response(i, k))) is (i == 1)
    alone = open_rows(prepare(tmp_path, lines(tmp_path / "p.jsonl", [PLAIN])))
    assert alone.learnt is None
    assert not (tmp_path / "cache" / "tokenised" / alone.report.digest / "learnt.bin").exists()
    last = open_rows(prepare(tmp_path, str(tmp_path / "r.jsonl"), options=LAST))
    assert last.tokens.tolist() == rows.tokens.tolist()
    assert last.report.digest != rows.report.digest
    kept = open_rows(without_rows(folder, rows, [("duplicates", np.array([1]), ["x"])], key="data.train", say=print))
    assert kept.mask(0, 0).tolist() == mask.tolist()  # type: ignore[union-attr]
    unit = rows.unit(0, (0, 1))
    assert unit.learnt is not None
    assert pack([unit], 2).counts.tolist() == rows.learnt_lengths()[0].tolist()


def test_kto_takes_the_mask_along(tmp_path: Path) -> None:
    other = PLAIN | {"prompt": "what is quick?"}
    rows = build_unpaired_rows(open_rows(prepare(tmp_path, lines(tmp_path / "r.jsonl", [AGENT, PLAIN, other]))), 512)
    found = 0
    for i in range(rows.n):
        for k in (0, 1):
            mask = rows.mask(i, k)
            found += mask is not None
            digest = sequence_digest(rows.prompt(i), rows.response(i, k), mask)
            assert rows.digests[i, k].tobytes() == digest
            assert rows.unit(i, (k,)).desirable is bool(rows.labels[i])  # type: ignore[index]
    assert found == 4  # both halves of the masked pair, as own and as mismatched responses
    last = open_rows(prepare(tmp_path, str(tmp_path / "r.jsonl"), options=LAST))
    short = build_unpaired_rows(
        last, int(last.lengths()[:, 0].max()) + 3
    )  # of the masked responses the cut leaves no answer
    assert (short.learnt_lengths() > 0).all()


def test_conversations_teach_every_answer(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(CHATML)
    talk = turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    path = lines(tmp_path / "r.jsonl", [{"messages": talk}])
    rows = open_rows(prepare(tmp_path, path))
    assert tokenizer.decode(rows.prompt(0)).endswith("user\na<|im_end|>\n<|im_start|>assistant\n")
    mask = rows.mask(0, 0)
    assert mask is not None
    assert tokenizer.decode(rows.response(0, 0)[mask]) == "b<|im_end|>d<|im_end|>"
    last = open_rows(prepare(tmp_path, path, options=LAST))
    assert (tokenizer.decode(last.response(0, 0)), last.mask(0, 0)) == ("d<|im_end|>", None)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_masked_sums_equal_plain_float64(name: str) -> None:
    """Masked and whole responses in one row; one of equal tokens with another mask is another sequence."""
    lm = make(name)
    exact = plain.build_plain(lm)
    draw = np.random.RandomState(5)
    units = []
    for u in pairs():
        masks = tuple(draw.rand(len(r)) < 0.5 for r in u.responses)
        for mask in masks:
            mask[draw.randint(len(mask))] = True
        units.append(Unit(u.row, u.prompt, u.responses, learnt=masks if u.row % 3 else None))
    units.append(Unit(999, units[1].prompt, units[1].responses, learnt=(None, None)))
    batch = pack(units, 2)
    reference = torch.zeros(len(units), 2, dtype=torch.float64)
    sums = Scorer(lm)(batch, DPO(0.3, 0.1), reference).sums
    wanted = []
    for u in units:
        for r, mask in zip(u.responses, u.learnt or (None, None), strict=True):
            scored = np.ones(len(r), dtype=bool) if mask is None else mask
            wanted.append(masked_logp(exact, u.prompt, r, scored))
    assert apart(sums, torch.tensor(wanted, dtype=torch.float64).view(-1, 2)) <= 1e-6
    counts = [r.scored for u in units for _, r in keyed_responses(u)]
    assert batch.counts[batch.units].flatten().tolist() == counts


def masked_logp(model: Any, prompt: np.ndarray, response: np.ndarray, scored: np.ndarray) -> float:
    """Differences of plain sums of prefixes, so that nothing of ours is asked."""
    total = 0.0
    for j in np.flatnonzero(scored).tolist():
        with torch.no_grad():
            total += float(plain.sequence_logp(model, np.r_[prompt, response[:j]], response[j : j + 1]))
    return total
