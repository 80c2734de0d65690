import pytest

from experiments.data_io.text.byte_bpe import LEAST_VOCABULARY, SEPARATOR, encode, learn_bpe

TEXTS = ["the cat sat on the mat. " * 20, "the dog sat on the log. " * 20]


def test_any_text_can_be_encoded_and_is_the_same_again():
    tokenizer = learn_bpe(TEXTS, 300)
    for text in ["the cat sat", "  Ü€ \n\t日本語 🙂", "\x00\x7f", ""]:
        (tokens,) = encode(tokenizer, [text])
        assert tokenizer.decode(tokens) == text


def test_what_repeats_becomes_one_token():
    tokenizer = learn_bpe(TEXTS, 300)
    assert encode(tokenizer, [" the"]) == [[tokenizer.token_to_id("Ġthe")]]
    assert tokenizer.get_vocab_size() <= 300


def test_with_the_least_vocabulary_a_token_is_a_byte():
    tokenizer = learn_bpe(TEXTS, LEAST_VOCABULARY)
    assert tokenizer.get_vocab_size() == LEAST_VOCABULARY
    assert len(encode(tokenizer, ["sat ü"])[0]) == len("sat ü".encode())


def test_the_separator_in_a_text_is_text():
    tokenizer = learn_bpe(TEXTS, 300)
    (tokens,) = encode(tokenizer, [f"a{SEPARATOR}b"])
    assert tokenizer.token_to_id(SEPARATOR) not in tokens
    assert tokenizer.decode(tokens) == f"a{SEPARATOR}b"


@pytest.mark.parametrize("vocabulary", [300, 2000])
def test_the_same_texts_make_the_same_tokens(vocabulary):
    first, second = (learn_bpe(TEXTS, vocabulary).to_str() for _ in range(2))
    assert first == second
