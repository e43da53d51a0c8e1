"""Random configurations and data files: valid ones with a few things changed, and plain noise."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hypothesis import strategies as st

from prefopt_dist.config import Config
from prefopt_dist.config.build import LOSSES

JSON = dict[str, Any]

HUGE = "a number of 5000 digits"
"""Written as one; Python itself refuses to print and to read such a number."""

# Characters that parsers stumble over, among ordinary ones.
TEXT = st.one_of(
    st.sampled_from(
        ["", " ", "x", "dpo", "auto", "null", "1", "\0", "\ud800", "\u2028", "\ufeff", "é", "a\nb", "~", "." * 300]
    ),
    st.text(max_size=12),
    st.text(st.characters(), max_size=6),
)
NUMBERS = st.one_of(
    st.integers(-3, 2000),
    st.sampled_from([10**400, -(10**25), 2**53 + 1, 2**63, HUGE]),
    st.floats(),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


def mostly(usual: st.SearchStrategy[Any], rare: st.SearchStrategy[Any], times: int = 5) -> st.SearchStrategy[Any]:
    """`usual` so many times as often as `rare`; one_of would take each alternative within them for one of its own."""
    return st.sampled_from([*[True] * times, False]).flatmap(lambda common: usual if common else rare)


def _dumps(value: Any, ascii_only: bool = True) -> str:
    return json.dumps(value, ensure_ascii=ascii_only).replace(f'"{HUGE}"', "9" * 5000)


# Configurations

VALID_CONFIG: dict[str, Any] = {
    "run": {"dir": "runs/x", "seed": 3},
    "model": {"name_or_path": "models/x", "dtype": "float32"},
    "data": {
        "train": [{"path": "a.jsonl", "weight": 0.5}],
        "eval": {"held": "b.jsonl"},
        "max_length": 99,
        "max_prompt_length": 50,
    },
    "loss": {"name": "dpo", "beta": 0.2},
    "optim": {"learning_rate": 1e-3, "betas": [0.9, 0.95]},
    "tracking": {"wandb": {"mode": "disabled", "tags": ["a"]}},
}
SECTIONS = [field.name for field in dataclasses.fields(Config)]
KEYS = sorted(
    {field.name for loss in LOSSES.values() for field in dataclasses.fields(loss)}
    | {key for section in VALID_CONFIG.values() for key in section}
    | {"path", "split", "weight", "wandb", "tags", "epochs", "max_steps", "keep", "eps", "eval", "policy", "checkpoint"}
)
GOOD = [
    "loss.beta=3e-1", "loss.label_smoothing=0.1", "loss.name=sft", "optim.eps=1e-6", "optim.betas=[0.5, 0]",
    "loss.name=ipo", "loss.name=simpo", "loss.gamma=1", "loss.average=tokens", "loss.sft_weight=0.5",
    "loss.name=mix", "loss.of={dpo: {weight: 1}, sft: {weight: 2}}", "loss.of.orpo={weight: 0.5, beta: 1}",
    "loss={name: mix, of: {ipo: {weight: 0.5}, dpo: {weight: 1, beta: 0.5}}}", "loss.of.ipo.average=sums",
    "data.eval=null", "data.train=[a, {path: b, split: c}]", 'run.cache="a b"', 'tracking.wandb.name="é\\n\\t\\u2028"',
    "train.max_steps=5", "train.max_hours=0.5", "data.max_length=513", 'run.dir="~"', 'run.dir="null"', 'run.dir="010"',
    "lora.r=4", "lora.target_modules=[a]", "inspect.duplicates=drop", "inspect.few_rows=stop", "inspect.picture=p.svg",
    "data.eval.more=x", "evaluate.model=5e-7x", 'model.tokenizer="=<<"', "tracking.wandb.tags=['1', ':', '- a', ' b']",
]  # fmt: skip
GOOD_KEYS = [override.partition("=")[0] for override in GOOD]
FIELDS_OF = {
    section: [key.split(".")[1] for key in GOOD_KEYS if key.startswith(f"{section}.")] or KEYS for section in SECTIONS
}
GOOD_VALUES = [0.5, 1, 2, 600, "x", "auto", "none", "float32", None, ["a"], {"a": "b"}, True, "online", "cpu"]
_WORDS = st.one_of(st.sampled_from(SECTIONS + KEYS), TEXT)


@st.composite
def configurations(draw: st.DrawFn) -> bytes:
    """A YAML file: the valid one with up to three changes, as JSON, which is YAML too."""
    config: Any = json.loads(json.dumps(VALID_CONFIG))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        place = config
        section = draw(mostly(st.sampled_from(SECTIONS), _WORDS))
        if draw(st.sampled_from([True, False, False])):
            place[section] = draw(VALUES)
            continue
        inside = place.setdefault(section, {})
        if isinstance(inside, dict):
            known = st.sampled_from(FIELDS_OF.get(section, KEYS))
            inside[draw(mostly(known, _WORDS))] = draw(mostly(st.sampled_from(GOOD_VALUES), VALUES, 1))
    if draw(st.sampled_from([*[False] * 19, True])):
        config["base"] = draw(VALUES)
    return _dumps(config).encode("utf-8", "surrogatepass")


_YAML_PIECES = [
    "run", "model", "data", "loss", "dir", "name_or_path", "train", "base", "beta", ": ", ":\n  ", "\n", "- ", "? ",
    "[", "]", "{", "}", ", ", "&a ", "*a", "<<: ", "|\n", ">-\n", '"', "'", "\\", "#", "%YAML 1.2\n", "---\n", "...\n",
    "!!int ", "!!float ", "!!bool ", "!!null ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ", "!!str ",
    "!!map ", "!!seq ", "!!python/object:os.system ", "!x ", "2001-02-30", "1e400", "0x1f", "1_000", "~", "\t", "=",
    "9" * 5000, "[" * 2000, "{a: " * 500, "\x00", "\x85", "\ufffe", "nan", ".nan", ".inf", "yes", "1:30", "é",
]  # fmt: skip
YAML_NOISE = st.one_of(
    st.lists(st.sampled_from(_YAML_PIECES), max_size=12).map(lambda pieces: "".join(pieces).encode()),
    st.binary(max_size=40),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
)
ANY = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(SECTIONS),
            st.sampled_from(KEYS),
            st.one_of(VALUES.map(lambda v: _dumps(v)), st.sampled_from(_YAML_PIECES), TEXT),
        ).map(lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}"),
        st.tuples(st.sampled_from(GOOD_KEYS), VALUES.map(_dumps)).map("=".join),
        TEXT,
    ),
    max_size=2,
)
OVERRIDES = mostly(st.lists(st.sampled_from(GOOD), max_size=3), ANY, 2)

# Data

USER, SYSTEM = {"role": "user", "content": "what is blue?"}, {"role": "system", "content": "be brief"}
SKY, GRASS = {"role": "assistant", "content": "the sky"}, {"role": "assistant", "content": "grass"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
VALID_ROWS: list[JSON] = [
    {"prompt": "what is blue?", "chosen_response": "the sky", "rejected_response": "grass"},
    {"prompt": "what is blue?", "chosen": "the sky", "rejected": "grass"},
    {"prompt": [SYSTEM, USER], "chosen": [SKY], "rejected": [GRASS], "tools": [{"name": "f"}]},
    {"prompt": [USER], "chosen": [SKY], "rejected": [CALL], "tools": '[{"name": "f"}]'},
    {"chosen": [SYSTEM, USER, SKY], "rejected": [SYSTEM, USER, GRASS]},
    {"chosen": "\n\nHuman: what? \n\nAssistant: the sky", "rejected": "\n\nHuman: what? \n\nAssistant: grass"},
    {"prompt": "what is blue?", "completion": "the sky"},
    {"messages": [USER, SKY, USER, GRASS]},
    {"prompt": "what is blue?", "completion": "the sky", "label": True},
]
FIELDS = sorted({name for row in VALID_ROWS for name in row} | {"role", "content", "name", "thinking", "tool_call_id"})
STRANGE_TEXT = st.one_of(
    TEXT,
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "</s></s>", "<s><s>x", "\n\nHuman:",
         "\n\nAssistant:", "### user:\n", "the " * 60, '[{"a": "\\ud800"}]', "[" * 2000, "[" + "9" * 5000 + "]"]
    ),
)  # fmt: skip
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "", None])},
    optional={
        "content": st.one_of(STRANGE_TEXT, VALUES),
        "name": VALUES,
        "tool_calls": VALUES,
        "reasoning_content": VALUES,
    },
)
FIELD_VALUES = st.one_of(STRANGE_TEXT, VALUES, st.lists(TURNS, max_size=3))


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """One line of a data file: a valid row with up to two changes, in fields or in bytes, or noise."""
    kind = draw(st.sampled_from(range(20)))
    if kind == 0:
        return draw(st.binary(max_size=30))
    if kind == 1:
        return _dumps(draw(VALUES)).encode("utf-8", "surrogatepass")
    if kind == 2:
        return draw(
            st.sampled_from([b"[" * 20_000, b'{"a":' * 20_000, b"\xef\xbb\xbf{}", b"\0", b"NaN", b"{}" * 2, b""])
        )
    row = dict(draw(st.sampled_from(VALID_ROWS)))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.one_of(st.sampled_from(sorted(row) or FIELDS), st.sampled_from(FIELDS), TEXT))
        if draw(st.booleans()):
            row[name] = draw(FIELD_VALUES)
        elif name in row and isinstance(row[name], list) and draw(st.booleans()):
            row[name] = [*row[name], draw(TURNS)]
        else:
            row.pop(name, None)
    line = _dumps(row, ascii_only=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == 3:
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.binary(max_size=3)) + line[at + draw(st.integers(0, 3)) :]
    return line
