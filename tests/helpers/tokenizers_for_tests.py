"""Small tokenizers, made in a moment: byte-level BPE trained on a few sentences."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "the quick brown fox jumps over the lazy dog. the quick brown fox is quick.",
    "what is the colour of the sky? the sky is blue. what is the colour of grass? green.",
    "user assistant system\nyou are a helpful assistant. yes. no. maybe. one two three four five six",
)
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)


def small_tokenizer(
    chat_template: str | None = None,
    *,
    adds_bos: bool = False,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens `SPECIALS`; `adds_bos`: it puts <s> before a text itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The text's tokens, nothing added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
