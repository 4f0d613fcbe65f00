"""Checkpoints of earlier versions: tests/checkpoints/ has a small one of each format."""

from pathlib import Path

import torch

from nanogpt.checkpoint import load_checkpoint
from nanogpt.classifier import Classifier

FOLDER = Path(__file__).parent / "checkpoints"
TEXT = b"The "


def test_a_language_model_of_format_1_loads_with_the_same_logits() -> None:
    checkpoint = load_checkpoint(FOLDER / "format1.ckpt")
    assert (checkpoint.stage, checkpoint.step, checkpoint.labels) == ("pretrain", 2, None)
    assert checkpoint.tokenizer.encode("The ") == list(TEXT)
    with torch.inference_mode():
        logits = checkpoint.model(torch.tensor([list(TEXT)]))[0, -1, :4]
    expected = torch.tensor([-0.030228, -0.057427, 0.005201, -0.043736])  # of the version itself
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_classifier_of_format_1_loads_with_the_same_logits() -> None:
    checkpoint = load_checkpoint(FOLDER / "format1_classifier.ckpt")
    assert checkpoint.labels == ["ham", "spam"]
    assert isinstance(checkpoint.model, Classifier)
    with torch.inference_mode():
        logits = checkpoint.model.class_logits(torch.tensor([list(TEXT)]), torch.tensor([4]))[0]
    torch.testing.assert_close(logits, torch.tensor([-0.192835, 0.192835]), atol=1e-5, rtol=0)
