"""The classifier: read at the last real token, whatever stands after it."""

from pathlib import Path

import pytest
import torch

from nanogpt.checkpoint import init_model, load_checkpoint, record, write_checkpoint
from nanogpt.classifier import (
    Classifier,
    class_probabilities,
    encode_text,
    pad,
    train_layers,
)
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import adamw, muon
from nanogpt.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONFIG = GPTConfig(
    block_size=16, vocab_size=TOKENIZER.vocab_size, n_layer=3, n_head=2, n_embd=8, dropout=0.1
)


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    model = Classifier(CONFIG, 3)
    torch.nn.init.normal_(model.classes.weight)
    return model.eval()


def trained(model: Classifier) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_class_is_read_at_the_last_real_token(classifier: Classifier) -> None:
    texts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    input_ids, lengths = pad(texts)
    together = classifier.class_logits(input_ids, lengths)
    for ids, logits in zip(texts, together, strict=True):
        state = classifier.hidden_states(torch.tensor([ids]))[0, -1]
        torch.testing.assert_close(logits, classifier.classes(state))


def test_what_stands_after_a_text_makes_no_difference(classifier: Classifier) -> None:
    input_ids, lengths = pad([[3, 1, 4], [1, 5, 9, 2, 6]])
    other = input_ids.clone()
    other[0, 3:] = 7
    torch.testing.assert_close(
        classifier.class_logits(input_ids, lengths), classifier.class_logits(other, lengths)
    )


def test_before_training_all_classes_are_equally_likely() -> None:
    probabilities = class_probabilities(Classifier(CONFIG, 4), TOKENIZER, ["a", "bc"])
    torch.testing.assert_close(probabilities, torch.full((2, 4), 0.25))


def test_a_text_has_the_same_probabilities_alone_and_among_others(classifier: Classifier) -> None:
    texts = ["one", "a longer one", "", "two", *(f"text {i}" for i in range(40))]
    together = class_probabilities(classifier, TOKENIZER, texts)
    for text, expected in zip(texts, together, strict=True):
        torch.testing.assert_close(class_probabilities(classifier, TOKENIZER, [text])[0], expected)
    torch.testing.assert_close(together.sum(-1), torch.ones(len(texts)))


def test_probabilities_are_those_without_dropout(classifier: Classifier) -> None:
    expected = class_probabilities(classifier, TOKENIZER, ["text"])
    classifier.train()
    torch.testing.assert_close(class_probabilities(classifier, TOKENIZER, ["text"]), expected)
    assert classifier.training


def test_a_text_stands_between_two_end_of_text_tokens() -> None:
    eot = TOKENIZER.eot_id
    assert encode_text(TOKENIZER, "ab", 16) == ([eot, 97, 98, eot], False)
    assert encode_text(TOKENIZER, "abcde", 5) == ([eot, 97, 98, 99, eot], True)


def test_a_classifier_keeps_the_weights_it_starts_from() -> None:
    model = GPT(CONFIG)
    classifier = Classifier.from_model(model, 2)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(classifier.eval()(ids), model.eval()(ids))
    torch.testing.assert_close(classifier.language_model().eval()(ids), model(ids))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("head", {"classes"}),
        ("last_1", {"classes", "ln_f", "h.2"}),
        ("last_2", {"classes", "ln_f", "h.1", "h.2"}),
        ("all", {"classes", "ln_f", "h.0", "h.1", "h.2", "wte", "wpe"}),
    ],
)
def test_only_the_named_layers_train(layers: str, expected: set[str]) -> None:
    model = Classifier(CONFIG, 2)
    train_layers(model, layers)
    modules = {".".join(name.split(".")[: 2 if name[0] == "h" else 1]) for name in trained(model)}
    assert modules == expected


@pytest.mark.parametrize("make", [adamw, muon])
def test_frozen_layers_have_no_gradient_and_no_optimizer_state(make: object) -> None:
    model = Classifier(CONFIG, 2)
    torch.nn.init.normal_(model.classes.weight)
    train_layers(model, "last_1")
    optimizer = make(model)  # type: ignore[operator]
    model.class_logits(*pad([[1, 2, 3]])).sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if p in optimizer.state}
    assert moved == trained(model)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("layers", ["last_0", "last_4", "first", "last"])
def test_layers_that_are_not_there_are_refused(layers: str) -> None:
    with pytest.raises(ValueError, match="all, head, or last_1 to last_3"):
        train_layers(Classifier(CONFIG, 2), layers)


def saved(classifier: Classifier, path: Path) -> Path:
    weights = {f"model.{name}": tensor for name, tensor in classifier.state_dict().items()}
    about = record("classify", CONFIG, TOKENIZER, labels=["no", "perhaps", "yes"])
    content = {"nanogpt": about, "state_dict": weights, "global_step": 5}
    write_checkpoint(content, path)
    return path


def test_a_checkpoint_gives_the_classifier_and_its_labels(
    classifier: Classifier, tmp_path: Path
) -> None:
    loaded = load_checkpoint(saved(classifier, tmp_path / "last.ckpt"))
    assert loaded.labels == ["no", "perhaps", "yes"]
    assert isinstance(loaded.model, Classifier)
    torch.testing.assert_close(
        class_probabilities(loaded.model, loaded.tokenizer, ["text"]),
        class_probabilities(classifier, TOKENIZER, ["text"]),
        rtol=0,
        atol=0,
    )


def test_a_run_that_starts_from_a_classifier_gets_no_classes(
    classifier: Classifier, tmp_path: Path
) -> None:
    start = init_model(saved(classifier, tmp_path / "last.ckpt"))
    assert type(start.model) is GPT
    assert start.labels is None
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(start.model(ids), classifier(ids))
