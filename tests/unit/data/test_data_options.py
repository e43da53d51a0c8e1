"""Columns by configuration, pairs of rated answers, a template and arguments of the user's own."""

from pathlib import Path
from typing import Any

import pytest
from data_for_tests import TOKENIZER, contents, lines, prepare
from encoding import encode, pair
from tokenizers_for_tests import CHATML, INST, small_tokenizer

from prefopt_dist.config import DataSource, load_config
from prefopt_dist.config.data import PairsFrom
from prefopt_dist.data import open_rows
from prefopt_dist.data.columns import rename_columns, value_at_path
from prefopt_dist.data.example import BadRow, Example, Message
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser
from prefopt_dist.errors import UserError
from prefopt_dist.rollouts.prompts import read_prompts
from prefopt_dist.setup.prepare_data import text_options

PAIR = {"prompt": "what?", "chosen": "yes", "rejected": "no"}
COLUMNS = TextOptions(columns=(("prompt", "asked.text"), ("chosen", "answers.0"), ("rejected", "answers.1")))


def test_columns_by_dotted_paths(tmp_path: Path) -> None:
    row = {"asked": {"text": "what?"}, "answers": ["yes", "no"], "score": 3}
    expected = open_rows(prepare(tmp_path, lines(tmp_path / "pair.jsonl", [PAIR])))
    path = lines(tmp_path / "odd.jsonl", [row])
    made = open_rows(prepare(tmp_path, path, options=COLUMNS))
    assert contents(made) == contents(expected)
    assert made.report.ignored == {path: {"score": 1}}
    of = Tokeniser(read_template(TOKENIZER, "auto", COLUMNS), 512, 256, COLUMNS)
    asked = read_prompts([DataSource(path)], tokeniser=of, longest=99, on_bad_row="stop", key="k")
    assert [p.ids for p in asked.all] == [made.prompt(0).tolist()]
    with pytest.raises(
        UserError, match=r"data\.format.*the first rows have the fields \['answers', 'asked', 'score'\]"
    ):
        prepare(tmp_path, path)
    assert value_at_path({"a": [{"b": 1}, {}]}, "a.b") == [1, None]
    assert value_at_path({"a": [1]}, "a.3") is value_at_path({"a": 1}, "a.b") is None


def test_a_mapped_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    """The rows' own column is read then, which a slip of the pen did not mean."""
    path, said = lines(tmp_path / "pair.jsonl", [PAIR | {"better": "yes"}]), list[str]()
    prepare(tmp_path, path, said=said, options=TextOptions(columns=(("chosen", "beter"),)))
    (line,) = [line for line in said if "data.columns" in line]
    assert "data.columns.chosen: none of the first rows has 'beter', so their column chosen is read" in line
    assert path in line
    said.clear()
    prepare(tmp_path, path, said=said, options=TextOptions(columns=(("chosen", "better"), ("tools", "functions"))))
    assert not [line for line in said if "data.columns" in line]


RATED = {"prompt": "what?", "answers": [{"text": t, "score": s} for t, s in (("b", 2), ("yes", 5.5), ("no", 1))]}


def from_scores(**changes: Any) -> TextOptions:
    return TextOptions(pairs_from=PairsFrom("answers.text", "answers.score", **changes))


def test_pairs_of_rated_answers(tmp_path: Path) -> None:
    made = rename_columns(RATED, from_scores())
    assert made == PAIR
    random = [rename_columns(RATED | {"n": n}, from_scores(pairing="best_random"))["rejected"] for n in range(20)]
    assert set(random) == {"b", "no"}
    assert random == [
        rename_columns(RATED | {"n": n}, from_scores(pairing="best_random"))["rejected"] for n in range(20)
    ]
    for row, options, kind in (
        (RATED, from_scores(min_margin=4.6), "tie"),
        (RATED | {"answers": [{"text": "a", "score": 1}, {"text": "b", "score": 1}]}, from_scores(), "tie"),
        (RATED | {"answers": 3}, from_scores(), "missing_field"),
        (RATED | {"answers": [{"text": "a"}]}, from_scores(), "missing_field"),
    ):
        with pytest.raises(BadRow) as caught:
            rename_columns(row, options)
        assert caught.value.kind == kind
    flat = RATED | {"answers": [{"text": "a", "score": 1}] * 2}
    path = lines(tmp_path / "r.jsonl", [flat, RATED])
    report = open_rows(prepare(tmp_path, path, options=from_scores())).report
    assert (report.used, report.dropped, report.form) == (1, {"tie": 1}, "pair")


LOUD = "{% if loud %}!{% endif %}{% if soft %}?{% endif %}" + CHATML


def test_arguments_of_the_configuration_and_of_the_row() -> None:
    tokenizer = small_tokenizer(LOUD)
    options = TextOptions(template_kwargs=(("loud", True), ("soft", True)))
    of = Tokeniser(read_template(tokenizer, "auto", options), 512, 256)
    first, second = of.encode(
        [pair("a", "yes", "no"), Example("a", ("yes", "no"), arguments=(("soft", False),))]
    )  # fmt: skip
    assert isinstance(first, TokenisedRow)
    assert isinstance(second, TokenisedRow)
    assert tokenizer.decode(first.prompt).startswith("!?<|im_start|>")
    assert tokenizer.decode(second.prompt).startswith("!<|im_start|>")


def test_a_template_of_the_user_s_own(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(CHATML)
    options = TextOptions(chat_template=INST)
    path = lines(tmp_path / "r.jsonl", [PAIR])
    own = open_rows(prepare(tmp_path, path, tokenizer=tokenizer, options=options))
    assert tokenizer.decode(own.prompt(0)) == "<s>[INST] what? [/INST]"
    plain = open_rows(prepare(tmp_path, path, tokenizer=tokenizer))
    assert own.report.digest != plain.report.digest


def test_a_template_for_tools() -> None:
    tokenizer = small_tokenizer()
    with_tools = "{{ tools | tojson }}" + CHATML
    tokenizer.chat_template = {"default": CHATML, "tool_use": with_tools}
    tools = ({"type": "function", "function": {"name": "look"}},)
    asked = (Message("user", "a"),)
    answers = ((Message("assistant", "yes"),), (Message("assistant", "no"),))
    assert "look" in tokenizer.decode(encode(tokenizer, Example(asked, answers, tools=tools)).prompt)
    assert tokenizer.decode(encode(tokenizer, Example(asked, answers)).prompt).startswith("<|im_start|>")


def test_the_configuration_says_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    (tmp_path / "mine.jinja").write_text(INST)
    file.write_text("run: {dir: x}\nmodel: {name_or_path: m}\ndata: {train: d}\n")
    assert text_options(load_config(file)) == TextOptions()
    said = [
        f"data.chat_template={tmp_path / 'mine.jinja'}", "data.template_kwargs={loud: true, n: 2}",
        "data.columns={prompt: a.b}", "data.pairs_from={responses: c.text, scores: c.score, min_margin: 1}",
    ]  # fmt: skip
    assert text_options(load_config(file, said)) == TextOptions(
        chat_template=INST, template_kwargs=(("loud", True), ("n", 2)), columns=(("prompt", "a.b"),),
        pairs_from=PairsFrom("c.text", "c.score", min_margin=1.0),
    )  # fmt: skip
    for override, words in (
        ("data.columns={prompt: 3}", r"^data\.columns\.prompt: got 3, must be a string"),
        ("data.template_kwargs={a: [1]}", r"^data\.template_kwargs\.a: got \[1\], must be a string, a number"),
        ("data.columns=3", r"^data\.columns: got 3, must be a mapping of names"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(file, [override])
    with pytest.raises(UserError, match=r"^data\.chat_template: .*nothing cannot be read"):
        text_options(load_config(file, [f"data.chat_template={tmp_path}/nothing"]))


@pytest.mark.parametrize(
    "options",
    [
        TextOptions(template_kwargs=(("loud", True),)),
        TextOptions(system="merge"),
        TextOptions(chat_template=INST.replace("[INST]", "[ASK]")),
        TextOptions(template_date="2025-01-01"),
        TextOptions(columns=(("prompt", "chosen"), ("chosen", "prompt"))),
    ],
)
def test_samples_and_data_are_keyed_by_the_settings(tmp_path: Path, options: TextOptions) -> None:
    """The digest of prompts names the folder of samples."""
    tokenizer = small_tokenizer("{% if loud %}!{% endif %}{{ strftime_now('%Y') }}" + INST)
    path = lines(tmp_path / "r.jsonl", [PAIR, PAIR | {"system": "be kind"}])

    def digests(settings: TextOptions) -> tuple[str, str]:
        of = Tokeniser(read_template(tokenizer, "auto", settings), 512, 256, settings)
        asked = read_prompts([DataSource(path)], tokeniser=of, longest=99, on_bad_row="drop", key="k")
        folder = prepare(tmp_path, path, tokenizer=tokenizer, options=settings, on_bad_row="drop")
        return asked.digest(), folder.name

    before, after = digests(TextOptions()), digests(options)
    assert before[0] != after[0]
    assert before[1] != after[1]
