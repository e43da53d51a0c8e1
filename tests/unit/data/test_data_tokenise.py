"""Template, boundary and truncation, with the exact ids."""

import pytest
from encoding import LONG, chat, encode, fault, pair
from tokenizers_for_tests import CHATML, INST, ids, small_tokenizer

from prefopt_dist.data.example import BadRow, Example, Message
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser
from prefopt_dist.errors import UserError

SKY = chat(("system", "you are a helpful assistant."), ("user", "what is the colour of the sky?"))
BLUE, GREEN = chat(("assistant", "blue.")), chat(("assistant", "green."))


def test_chatml_messages() -> None:
    tokenizer = small_tokenizer(CHATML)
    row = encode(tokenizer, pair(SKY, BLUE, GREEN))
    prompt = (
        "<|im_start|>system\nyou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nwhat is the colour of the sky?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row.prompt == ids(tokenizer, prompt)
    # The newline after <|im_end|> is dropped.
    assert row.responses == (ids(tokenizer, "blue.<|im_end|>"), ids(tokenizer, "green.<|im_end|>"))
    assert not row.cut
    assert not row.repaired
    assert not row.as_is


@pytest.mark.parametrize("adds_bos", [False, True])
def test_inst_has_bos_and_eos_once(adds_bos: bool) -> None:
    tokenizer = small_tokenizer(INST, adds_bos=adds_bos)
    row = encode(tokenizer, pair("what is green?", "grass", "the sky"))
    assert row.prompt == ids(tokenizer, "<s>[INST] what is green? [/INST]")
    assert row.responses == (ids(tokenizer, " grass</s>"), ids(tokenizer, " the sky</s>"))


def test_plain_template_where_there_is_none() -> None:
    tokenizer = small_tokenizer()
    row = encode(tokenizer, pair("what is green?", "grass", "the sky"))
    assert row.prompt == ids(tokenizer, "<s>### user:\nwhat is green?\n\n### assistant:\n")
    assert row.responses == (ids(tokenizer, "grass</s>"), ids(tokenizer, "the sky</s>"))
    assert fault(tokenizer, Example(SKY, (BLUE, GREEN), tools=({"name": "f"},))) == "template_refused"


def test_bos_stands_as_the_model_s_own_chat_has_it() -> None:
    tokenizer = small_tokenizer(CHATML, adds_bos=True)
    row = encode(tokenizer, pair("a", "yes", "no"))
    assert row.prompt == ids(tokenizer, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    assert encode(tokenizer, pair("what is", " blue", " green"), "none").prompt == ids(tokenizer, "<s>what is")


def test_strings_that_carry_the_template() -> None:
    tokenizer = small_tokenizer(CHATML)
    prompt = "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    expected = encode(tokenizer, pair("what?", "yes", "no"))
    for template in ("auto", "none"):
        row = encode(tokenizer, pair(prompt, "yes<|im_end|>\n", "no"), template)
        assert (row.prompt, row.responses, row.as_is) == (expected.prompt, expected.responses, True)
        assert not row.repaired
    assert fault(tokenizer, pair(prompt, "yes", "no"), "chat") == "doubled_template"
    assert fault(tokenizer, pair("what?", "<|im_start|>assistant\nyes", "no")) == "doubled_template"
    # A marker may be text and no token.
    inst = small_tokenizer(INST)
    row = encode(inst, pair("<s><s>[INST] what? [/INST]", " yes", " no</s></s>"))
    assert row.prompt == ids(inst, "<s>[INST] what? [/INST]")
    assert row.responses == (ids(inst, " yes</s>"), ids(inst, " no</s>"))
    assert row.repaired == {"double_bos", "double_end"}
    # An end token alone is no turn: it also stands in ordinary text.
    assert not encode(inst, pair("what is </s> in HTML?", "yes", "no")).as_is


def test_template_none() -> None:
    tokenizer = small_tokenizer(CHATML)
    row = encode(tokenizer, pair("what is", " blue", " green"), "none")
    assert row.prompt == ids(tokenizer, "what is")
    assert row.responses == (ids(tokenizer, " blue</s>"), ids(tokenizer, " green</s>"))
    with pytest.raises(UserError, match=r"data\.template.*messages.*data\.template=auto"):
        encode(tokenizer, pair(SKY, BLUE, GREEN), "none")


def test_end_token_stands_once() -> None:
    tokenizer = small_tokenizer(CHATML)
    row = encode(tokenizer, pair("what?", "yes<|im_end|>", "no<|im_end|>\n<|im_end|>"))
    assert row.responses == (ids(tokenizer, "yes<|im_end|>"), ids(tokenizer, "no<|im_end|>"))
    assert row.repaired == {"double_end"}
    row = encode(tokenizer, pair("what?", "yes</s>", "no"))
    assert row.responses[0] == ids(tokenizer, "yes<|im_end|>")
    assert row.repaired == {"double_end"}
    assert fault(tokenizer, pair("what?", "yes<|im_end|>no", "no")) == "end_token_inside"
    assert fault(tokenizer, pair("what?", "<|im_end|>", "no")) == "empty_response"
    # Identical as tokens, though not as strings.
    assert fault(tokenizer, pair("what?", "yes<|im_end|>", "yes")) == "identical_responses"


def test_bos_of_a_raw_string_is_not_doubled() -> None:
    tokenizer = small_tokenizer(INST)
    row = encode(tokenizer, pair("<s>what?", "yes", "no"))
    assert row.prompt == ids(tokenizer, "<s>[INST] what? [/INST]")
    assert row.repaired == {"double_bos"}
    assert fault(tokenizer, pair("<s>", "yes", "no")) == "empty_prompt"


def test_token_over_the_boundary_belongs_to_the_response() -> None:
    tokenizer = small_tokenizer(CHATML)
    whole = ids(tokenizer, "the quick brown")
    assert len(whole) == 3 < len(ids(tokenizer, "the quick bro")), "the tokenizer must merge ' brown'"
    row = encode(tokenizer, pair("the quick bro", "wn fox", "wn dog"), "none")
    assert row.prompt == whole[:2]
    assert row.responses == (ids(tokenizer, " brown fox</s>"), ids(tokenizer, " brown dog</s>"))
    # One response merges, the other does not: the prompt is what both share.
    row = encode(tokenizer, pair("the quick bro", "wn fox", "!"), "none")
    assert row.prompt == whole[:2]
    assert row.responses == (ids(tokenizer, " brown fox</s>"), ids(tokenizer, " bro!</s>"))
    assert fault(tokenizer, pair(" t", "he fox", "he dog"), "none") == "empty_prompt"


def test_templates_that_cannot_be_used() -> None:
    unstable = small_tokenizer("{{ messages | length }}" + CHATML)
    assert fault(unstable, pair(SKY, BLUE, GREEN)) == "unstable_template"
    assert fault(small_tokenizer(INST), pair(SKY, BLUE, GREEN)) == "template_refused"
    with pytest.raises(UserError, match=r"model\.tokenizer.*eos_token"):
        read_template(small_tokenizer(eos=None), "auto")
    with pytest.raises(UserError, match=r"model\.tokenizer.*template"):
        read_template(small_tokenizer("{{ raise_exception('never') }}"), "auto")
    # A template without an end token: eos is appended.
    bare = small_tokenizer("{% for message in messages %}{{ message['content'] }}|{% endfor %}")
    assert encode(bare, pair("a", "yes", "no")).responses == (ids(bare, "yes|</s>"), ids(bare, "no|</s>"))


TURNS = chat(
    ("system", "you are a helpful assistant."),
    ("user", "one two"),
    ("assistant", "three"),
    ("user", "four five"),
    ("assistant", "six"),
    ("user", "what is the colour?"),
)


def test_prompt_is_cut_by_whole_turns() -> None:
    tokenizer = small_tokenizer(CHATML)
    full = encode(tokenizer, pair(TURNS, BLUE, GREEN))
    shorter = encode(tokenizer, pair(TURNS[:1] + TURNS[3:], BLUE, GREEN))
    shortest = encode(tokenizer, pair(TURNS[:1] + TURNS[5:], BLUE, GREEN))
    length = len(full.prompt) + max(map(len, full.responses))
    # Everything fits: nothing is cut, however long the prompt.
    assert encode(tokenizer, pair(TURNS, BLUE, GREEN), max_length=length, max_prompt=3) == full
    for max_prompt, expected in (
        (len(full.prompt) - 1, shorter),
        (len(shorter.prompt), shorter),
        (len(shorter.prompt) - 1, shortest),
        (len(shortest.prompt), shortest),
    ):
        row = encode(tokenizer, pair(TURNS, BLUE, GREEN), max_length=length - 1, max_prompt=max_prompt)
        assert (row.prompt, row.responses) == (expected.prompt, expected.responses)
        assert row.cut == {"prompt"}
    # The last question is cut as a string would be; its frame and the system turn stay.
    example = pair(TURNS, BLUE, GREEN)
    row = encode(tokenizer, example, max_length=length - 1, max_prompt=len(shortest.prompt) - 2)
    system = "<|im_start|>system\nyou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    cut = tokenizer.decode(row.prompt)
    assert cut.startswith(system)
    assert len(row.prompt) <= len(shortest.prompt) - 2
    assert cut.endswith("the colour?<|im_end|>\n<|im_start|>assistant\n")
    assert row.cut == {"prompt"}
    frame = len(encode(tokenizer, pair((*TURNS[:1], Message("user", "x")), BLUE, GREEN)).prompt) - 1
    assert fault(tokenizer, example, max_length=length - 1, max_prompt=frame) == "prompt_too_long"


def test_both_responses_are_cut_to_the_same_budget() -> None:
    tokenizer = small_tokenizer(CHATML)
    chosen, rejected = (
        chat(("assistant", "one two three four five six")),
        chat(("assistant", "no one two three")),
    )
    full = encode(tokenizer, pair(SKY, chosen, rejected))
    prompt = len(full.prompt)
    for budget in (len(full.responses[0]) - 1, len(full.responses[1]) - 1, 1):
        # The prompt is within its limit, so it is not cut.
        row = encode(tokenizer, pair(SKY, chosen, rejected), max_length=prompt + budget, max_prompt=prompt)
        assert row.prompt == full.prompt
        assert row.cut == {"response"}
        assert row.responses == (full.responses[0][:budget], full.responses[1][:budget])
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in row.responses[0]
    same = chat(("assistant", "one two three four!"))
    example = pair(SKY, chosen, same)
    assert fault(tokenizer, example, max_length=prompt + 2, max_prompt=prompt) == "identical_after_cut"


def test_strings_are_cut_from_the_head() -> None:
    tokenizer = small_tokenizer(adds_bos=True)
    text = "one two three four five six"
    row = encode(tokenizer, pair(text, " yes", " no"), "none")
    assert row.prompt == ids(tokenizer, "<s>" + text)
    keep = len(row.prompt) - 3
    cut = encode(tokenizer, pair(text, " yes", " no"), "none", max_length=keep + 4, max_prompt=keep)
    assert cut.prompt == row.prompt[:1] + row.prompt[4:]
    # A string that became one turn keeps the frame of the turn.
    full = encode(tokenizer, pair(text, "yes", "no"))
    keep = len(full.prompt) - 2
    length = len(full.prompt) + len(full.responses[0]) - 1
    cut = encode(tokenizer, pair(text, "yes", "no"), max_length=length, max_prompt=keep)
    kept = tokenizer.decode(cut.prompt)
    assert kept.startswith("<s>### user:\n")
    assert kept.endswith("four five six\n\n### assistant:\n")
    assert keep - 3 <= len(cut.prompt) <= keep
    assert cut.cut == {"prompt"}
    frame = len(encode(tokenizer, pair("x", "yes", "no")).prompt) - 1
    kind = fault(tokenizer, pair(text, "yes", "no"), max_length=length, max_prompt=frame)
    assert kind == "prompt_too_long"


def test_a_batch_keeps_its_order() -> None:
    tokenizer = small_tokenizer(CHATML)
    tokeniser = Tokeniser(read_template(tokenizer, "auto"), LONG, LONG - 1)
    examples = [
        pair("a", "yes", "no"),
        pair("b", "yes<|im_end|>no", "no"),
        Example("c", ("yes",), label=True),
    ]
    first, second, third = tokeniser.encode(examples)
    assert isinstance(first, TokenisedRow)
    assert "a" in tokenizer.decode(first.prompt)
    assert isinstance(second, BadRow)
    assert isinstance(third, TokenisedRow)
    assert third.label is True
    assert len(third.responses) == 1
