from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.compute.precision import Precision
from fundamentallm.data.examples import Example, encode_examples
from fundamentallm.data.loaders import Batching, ValidationLoader
from fundamentallm.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
    changes_texts,
)
from fundamentallm.inference import evaluate as module
from fundamentallm.inference.evaluate import (
    Document,
    _windows,
    decoded_size,
    evaluate_documents,
    example_documents,
    predicted_size,
    split_documents,
    text_document,
)
from fundamentallm.models.transformer import Transformer
from fundamentallm.testing import tiny_model
from fundamentallm.training.evaluator import Evaluator

CPU = Precision("fp32", torch.device("cpu"))
CONTEXT = 8
TOKENIZER = CharacterTokenizer("abcdé")


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = tiny_model(TOKENIZER.vocab_size, CONTEXT).double()
    with torch.no_grad():
        for parameter in model.parameters():  # so that context matters
            parameter.mul_(3)
    return model


def document(text: str, name: str = "", num_given: int = 1) -> Document:
    return Document(name, TOKENIZER.encode(text), num_given)


def naive_nll(model: Transformer, ids: list[int], num_given: int, stride: int) -> list[float]:
    """Each token's own forward pass, from the context that the stride leaves it."""
    losses = []
    for place in range(num_given, len(ids)):
        windows_before = max(0, -(-(place - CONTEXT) // stride))
        context = ids[windows_before * stride : place]
        assert len(context) >= min(place, CONTEXT - stride + 1)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([context]))[0, -1]
        losses.append(-float(logits.log_softmax(-1)[ids[place]]))
    return losses


TEXTS = ["abcdabcdéabcddcbaabcddéa", "ab", "a", "éé", "abcdabcda", "abcdabcd", "dcba" * 9]


@pytest.mark.parametrize("stride", range(1, CONTEXT + 1))
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_each_token_is_predicted_once_from_its_context(
    model: Transformer, stride: int, batch_size: int
) -> None:
    documents = [document(text, num_given=1 + n % 3) for n, text in enumerate(TEXTS)]
    total, each = evaluate_documents(model, TOKENIZER, documents, CONTEXT, batch_size, CPU, stride)
    everything = []
    for one, measured in zip(documents, each, strict=True):
        expected = naive_nll(model, one.tokens.tolist(), one.num_given, stride)
        everything += expected
        assert measured.num_tokens == len(expected) == one.num_predicted
        if expected:
            assert measured.loss == pytest.approx(np.mean(expected), abs=1e-12)
            assert measured.perplexity == pytest.approx(math.exp(np.mean(expected)))
        else:
            assert math.isnan(measured.loss)
    assert total.num_tokens == len(everything)
    assert total.loss == pytest.approx(np.mean(everything), abs=1e-12)
    text = "".join(text[1 + n % 3 :] for n, text in enumerate(TEXTS))
    assert (total.num_characters, total.num_bytes) == (len(text), len(text.encode()))
    bits = sum(everything) / math.log(2)
    assert total.bits_per_character == pytest.approx(bits / len(text))
    assert total.bits_per_byte == pytest.approx(bits / len(text.encode()))


def test_without_a_stride_it_is_the_loss_of_training(model: Transformer) -> None:
    tokens = TOKENIZER.encode("abcddcbé" * 20)
    output = Evaluator(model, CPU)
    output.run(ValidationLoader(tokens, Batching(CONTEXT, 4)))
    total, _ = evaluate_documents(model, TOKENIZER, [Document("", tokens)], CONTEXT, 4, CPU)
    assert total.num_tokens == output.num_tokens
    assert total.loss == pytest.approx(output.state.metrics["loss"], abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_documents_packed_apart_weigh_what_they_do_in_training(
    model: Transformer, batch_size: int
) -> None:
    tokens = TOKENIZER.encode("abcdédcbédéacbbacdéaabé" * 7)
    end_id = int(TOKENIZER.encode("é")[0])
    loader = ValidationLoader(tokens, Batching(CONTEXT, 4), end_id=end_id)
    output = Evaluator(model, CPU)
    output.run(loader)
    documents = [Document("", tokens)]
    figures = [
        evaluate_documents(
            model, TOKENIZER, documents, CONTEXT, batch_size, CPU, end_id=end_id, stride=stride
        )[0]
        for stride in (CONTEXT, 1)
    ]
    assert figures[0].num_tokens == figures[1].num_tokens == output.num_tokens
    assert figures[0].loss == pytest.approx(output.state.metrics["loss"], abs=1e-12)
    together = evaluate_documents(model, TOKENIZER, documents, CONTEXT, batch_size, CPU)[0]
    assert abs(together.loss - output.state.metrics["loss"]) > 1e-3
    # No document is longer than the context: with each window as far back as it goes, each is
    # read whole, as if it stood alone.
    alone = split_documents(documents[0], end_id)
    each = evaluate_documents(model, TOKENIZER, alone, CONTEXT, batch_size, CPU)[0]
    assert each.num_tokens == figures[1].num_tokens
    assert each.loss == pytest.approx(figures[1].loss, abs=1e-12)


@given(st.lists(st.integers(0, 2), max_size=30))
def test_documents_of_a_text_predict_together_what_it_does(ids: list[int]) -> None:
    found = split_documents(Document("text", np.array(ids, np.uint8)), 0)
    assert sum(one.num_predicted for one in found) == max(0, len(ids) - 1)
    joined = [token for one in found for token in one.tokens[one.num_given :].tolist()]
    assert joined == ids[1:]
    for one in found[1:]:
        assert one.tokens[0] == 0
        assert 0 not in one.tokens[1:-1]
    assert len({one.name for one in found}) == len(found)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=5),
    st.integers(1, 9),
    st.data(),
)
def test_windows_cover_every_token_once(
    sizes: list[tuple[int, int]], length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    documents = [Document("", np.zeros(size, np.uint8), given) for size, given in sizes]
    covered: list[tuple[int, int]] = []
    for number, start, first, last in _windows(documents, length, stride):
        assert 0 <= start < first <= last <= start + length
        assert first - start >= min(first, length - stride + 1)
        covered += [(number, place) for place in range(first, last + 1)]
    assert covered == [
        (number, place)
        for number, (size, num_given) in enumerate(sizes)
        for place in range(num_given, size)
    ]


@given(st.lists(st.text("abé\U0001f600", min_size=1, max_size=6), min_size=1, max_size=4))
def test_bytes_and_characters_are_those_of_the_text(texts: list[str]) -> None:
    """Whatever the tokens are, a document weighs its text less its first character, or a part."""
    tokenizers: list[Tokenizer] = [CharacterTokenizer("abé\U0001f600"), ByteTokenizer()]
    for tokenizer in tokenizers:
        documents = [Document(text, tokenizer.encode(text)) for text in texts]
        uniform = tiny_model(tokenizer.vocab_size, CONTEXT).double()
        with torch.no_grad():
            uniform.head.weight.zero_()
        total, each = evaluate_documents(uniform, tokenizer, documents, CONTEXT, 4, CPU)
        for one, text in zip(each, texts, strict=True):
            whole = isinstance(tokenizer, CharacterTokenizer) or text[0].isascii()
            rest = text[1:] if whole else text
            assert (one.num_characters, one.num_bytes) == (len(rest), len(rest.encode()))
        assert total.num_bytes == sum(one.num_bytes for one in each)
        if total.num_tokens:
            assert total.perplexity == pytest.approx(tokenizer.vocab_size)
            assert total.bits_per_byte * total.num_bytes == pytest.approx(
                total.num_tokens * math.log2(tokenizer.vocab_size)
            )


BPE = BpeTokenizer(270, texts=["naïve 你好 \U0001f600 the cat sat on the mat " * 3])


@given(st.text("ab é你\U0001f600\ufffd<", max_size=30), st.integers(1, 9))
def test_a_text_is_as_long_as_its_pieces(text: str, piece: int) -> None:
    for tokenizer in (BPE, ByteTokenizer(end=True)):
        tokens = tokenizer.encode(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PIECE", piece)
            assert decoded_size(tokenizer, tokens) == (len(text), len(text.encode()))


def word_pieces() -> SubwordTokenizer:
    """Lower-case words, whose text is decoded with a space between any two."""
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    library.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=["[UNK]"], show_progress=False
    )
    library.train_from_iterator(["the cat sat on the mat"], trainer)
    return SubwordTokenizer(json.loads(library.to_str()))


def normalizing() -> SubwordTokenizer:
    state = json.loads(json.dumps(BPE.json))
    state["normalizer"] = {"type": "NFC"}
    return SubwordTokenizer(state)


@pytest.mark.parametrize(
    ("tokenizer", "changes"),
    [
        (ByteTokenizer(), False),
        (BPE, False),
        (CharacterTokenizer("ab"), False),
        (CharacterTokenizer("ab", "skip"), True),
        (CharacterTokenizer("ab", "replace"), True),
        (word_pieces(), True),
        (normalizing(), True),
    ],
)
def test_a_tokenizer_that_changes_texts_is_known(tokenizer: Tokenizer, changes: bool) -> None:
    assert changes_texts(tokenizer) == changes


@pytest.mark.parametrize("tokenizer", [word_pieces(), CharacterTokenizer("the cas", "skip")])
def test_a_text_weighs_what_it_is_and_not_what_is_decoded(tokenizer: Tokenizer) -> None:
    text = "the cat, sat!!  on\n\u4f60\u597d the mat"
    one = text_document("", text, tokenizer)
    assert tokenizer.decode(one.tokens) != text
    first = len(tokenizer.decode(one.tokens[:1]))
    assert predicted_size(tokenizer, one) == (len(text) - first, len(text.encode()) - first)
    uniform = tiny_model(tokenizer.vocab_size, CONTEXT).double()
    with torch.no_grad():
        uniform.head.weight.zero_()
    total, _ = evaluate_documents(uniform, tokenizer, [one], CONTEXT, 4, CPU)
    bits = (len(one.tokens) - 1) * math.log2(tokenizer.vocab_size)
    assert total.bits_per_byte == pytest.approx(bits / (len(text.encode()) - first))


def test_an_example_weighs_what_its_response_does() -> None:
    tokenizer = CharacterTokenizer("abc", "skip")
    examples = [Example("aXX", "bYYYc", "one"), Example("", "aZ\u00e9b", "two")]
    encoded = encode_examples(examples, tokenizer, CONTEXT)
    documents = example_documents(encoded, examples, tokenizer)
    assert [document.name for document in documents] == ["one", "two"]
    assert [document.num_given for document in documents] == [1, 1]
    assert [document.size for document in documents] == [(5, 5), (3, 4)]


@given(st.text("ab \u00e9\u4f60\U0001f600", min_size=1, max_size=30))
def test_a_text_that_comes_back_weighs_what_its_tokens_do(text: str) -> None:
    for tokenizer in (BPE, ByteTokenizer(end=True), CharacterTokenizer(text)):
        one = text_document("", text, tokenizer)
        assert one.size == predicted_size(tokenizer, replace(one, size=None))


def test_documents_never_read_one_another(model: Transformer) -> None:
    alone = evaluate_documents(model, TOKENIZER, [document("abcd")], CONTEXT, 4, CPU)[0]
    among = [document("dddddd"), document("abcd"), document("ab")]
    each = evaluate_documents(model, TOKENIZER, among, CONTEXT, 3, CPU)[1]
    assert each[1].loss == pytest.approx(alone.loss, abs=1e-13)
    assert each[0].loss != pytest.approx(alone.loss, abs=1e-3)


def test_modes_and_random_numbers_are_left_alone(model: Transformer) -> None:
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    evaluate_documents(model, TOKENIZER, [document("abcd")], CONTEXT, 1, CPU)
    assert model.training
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("stride", [0, -1, CONTEXT + 1])
def test_a_stride_that_would_miss_tokens_is_refused(model: Transformer, stride: int) -> None:
    with pytest.raises(ValueError, match="stride must be 1 to 8"):
        evaluate_documents(model, TOKENIZER, [document("ab")], CONTEXT, 1, CPU, stride)


def test_nothing_to_measure() -> None:
    model = tiny_model(TOKENIZER.vocab_size, CONTEXT)
    total, each = evaluate_documents(model, TOKENIZER, [], CONTEXT, 1, CPU)
    assert each == []
    assert math.isnan(total.loss)
    assert total.num_tokens == total.num_bytes == 0
