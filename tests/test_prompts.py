"""Templates: what they spell, what can never become scaffold, and Hugging Face renders alike."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.detokenizer import Detokenizer
from nanogpt.prompts import TEMPLATES, Message, find_template, trimmed
from nanogpt.tokenizer import END_OF_TEXT, Tokenizer, bpe_tokenizer, byte_tokenizer
from nanogpt.tokenizer_files import write_tokenizer

CHAT, ALPACA = find_template("chat"), find_template("alpaca")
QUESTION = [Message("user", "Hi there!")]
TALK = [
    Message("system", "Be brief."),
    Message("user", "What is 2 + 3?"),
    Message("assistant", "It is 5."),
    Message("user", "Translate it.", context="It is 5."),
    Message("assistant", "C'est 5."),
]
BPE = bpe_tokenizer([Path(__file__).read_text(encoding="utf-8")] * 2, vocab_size=400)
TOKENIZERS = [t.with_special_tokens(CHAT.special_tokens) for t in (byte_tokenizer(), BPE)]
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
contents = st.text() | st.sampled_from(["<|endoftext|>", "<|user|>x", "### Response:\n", "<|assis"])


def spelt(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of ids with the names of special tokens in it."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return b"".join(
        names[i].encode() if i in names else tokenizer.decode_bytes([i]) for i in ids
    ).decode()


@every_tokenizer
def test_chat_is_turn_markers_and_contents(tokenizer: Tokenizer) -> None:
    ids, _ = CHAT.encode(tokenizer, TALK, add_generation_prompt=True)
    assert spelt(tokenizer, ids) == (
        "<|endoftext|><|system|>Be brief.<|user|>What is 2 + 3?<|assistant|>It is 5.<|endoftext|>"
        "<|user|>Translate it.\n\nIt is 5.<|assistant|>C'est 5.<|endoftext|><|assistant|>"
    )


@every_tokenizer
def test_alpaca_is_the_published_prompt(tokenizer: Tokenizer) -> None:
    messages = [Message("user", " Translate.\n", "It is 5."), Message("assistant", "C'est 5.")]
    ids, _ = ALPACA.encode(tokenizer, messages)
    assert spelt(tokenizer, ids) == (
        "<|endoftext|>Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nTranslate.\n\n"
        "### Input:\nIt is 5.\n\n### Response:\nC'est 5.<|endoftext|>"
    )


def test_a_system_message_takes_the_place_of_alpacas_first_sentence() -> None:
    ids, _ = ALPACA.encode(TOKENIZERS[0], [Message("system", "Answer."), *QUESTION])
    assert spelt(TOKENIZERS[0], ids) == "<|endoftext|>Answer.\n\n### Instruction:\nHi there!\n\n"


@every_tokenizer
@pytest.mark.parametrize("name", ["chat", "alpaca"])
def test_responses_and_their_ends_are_marked_and_nothing_else(
    name: str, tokenizer: Tokenizer
) -> None:
    ids, is_response = TEMPLATES[name].encode(tokenizer, TALK)
    marked = [i for i, response in zip(ids, is_response, strict=True) if response]
    assert spelt(tokenizer, marked) == "It is 5.<|endoftext|>C'est 5.<|endoftext|>"


@every_tokenizer
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_serving_reads_begins_what_training_read(name: str, tokenizer: Tokenizer) -> None:
    whole, is_response = TEMPLATES[name].encode(tokenizer, TALK)
    prompt, _ = TEMPLATES[name].encode(tokenizer, TALK[:-1], add_generation_prompt=True)
    assert whole[: len(prompt)] == prompt
    assert all(is_response[len(prompt) :])


@every_tokenizer
@settings(deadline=None)
@given(content=contents, reply=contents)
def test_any_content_comes_back_from_chat(tokenizer: Tokenizer, content: str, reply: str) -> None:
    messages = [Message("user", content), Message("assistant", reply)]
    ids, _ = CHAT.encode(tokenizer, messages)
    special = tokenizer.special_tokens
    eot, user, assistant = (special[n] for n in (END_OF_TEXT, "<|user|>", "<|assistant|>"))
    assert [i for i in ids if i in special.values()] == [eot, user, assistant, eot]
    middle = ids.index(assistant)
    assert tokenizer.decode(ids[2:middle]) == content
    assert tokenizer.decode(ids[middle + 1 : -1]) == reply


@every_tokenizer
@settings(deadline=None)
@given(content=contents)
def test_no_content_can_end_the_text_in_alpaca(tokenizer: Tokenizer, content: str) -> None:
    ids, _ = ALPACA.encode(tokenizer, [Message("user", content)], add_generation_prompt=True)
    assert ids.index(tokenizer.eot_id, 0) == 0
    assert ids.count(tokenizer.eot_id) == 1


@every_tokenizer
def test_end_of_text_and_every_marker_stop_a_reply(tokenizer: Tokenizer) -> None:
    names = [END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>"]
    assert CHAT.stop_ids(tokenizer) == [tokenizer.special_tokens[name] for name in names]
    assert ALPACA.stop_ids(tokenizer) == [tokenizer.eot_id]


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@every_tokenizer
@pytest.mark.parametrize("name", ["chat", "alpaca"])
@pytest.mark.parametrize(
    "messages", [QUESTION, TALK, TALK[1:]], ids=["question", "talk", "no-system"]
)
def test_hugging_face_renders_the_same_ids(
    messages: list[Message],
    name: str,
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
    tmp_path: Path,
) -> None:
    from transformers import PreTrainedTokenizerFast

    template = TEMPLATES[name]
    write_tokenizer(tokenizer, tmp_path, 64, template.jinja(tokenizer))
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids, _ = template.encode(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    rendered = theirs.apply_chat_template(
        [vars(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    assert rendered == ids


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_hugging_face_keeps_the_indentation_of_a_response(name: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = TEMPLATES[name]
    reply = "    return x" if template.trims else "\n    return x\n"
    messages = [Message("user", "Return."), Message("assistant", reply)]
    ours = "".join(text for text, *_ in template.render(messages))
    theirs = ImmutableSandboxedEnvironment().from_string(template.jinja(byte_tokenizer()))
    assert theirs.render(messages=[vars(message) for message in messages]) == ours
    assert reply in ours
    surrounded = [messages[0], Message("assistant", f"\r\n{reply} \n")]
    rendered = theirs.render(messages=[vars(message) for message in surrounded])
    assert not template.trims or rendered == ours


def test_a_reply_keeps_its_indentation() -> None:
    text = "\n    return x\n\n### Instruction:\nx"
    detokenizer = Detokenizer(TOKENIZERS[0].token_bytes(), ALPACA.stop_texts)
    assert trimmed(detokenizer.feed(TOKENIZERS[0].encode(text))) == "    return x"


def test_a_tokenizer_without_the_markers_is_refused() -> None:
    bare = Tokenizer("bare", BPE.pattern, [bytes([i]) for i in range(256)], [END_OF_TEXT])
    with pytest.raises(ValueError, match=r"tokenizer bare has no <\|user\|>"):
        CHAT.encode(bare, QUESTION)


@pytest.mark.parametrize(
    ("messages", "found"),
    [([], "conversation is empty"), ([*QUESTION, Message("system", "x")], "put it first")],
)
def test_a_conversation_out_of_order_is_refused(messages: list[Message], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        CHAT.encode(TOKENIZERS[0], messages)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of system, user, assistant"):
        Message("bot", "Hi")
    with pytest.raises(ValueError, match="one of chat, alpaca, plain"):
        find_template("vicuna")
