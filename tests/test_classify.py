"""The classification loss and its metrics, by hand; every split of a step gives one update."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from nanogpt.classifier import Classifier, pad
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Constant, adamw
from nanogpt.report.report import write_report
from nanogpt.tokenizer import byte_tokenizer
from nanogpt.training.classify import ClassifyModule, Loss, make_loss, measure, mistakes
from nanogpt.training.module import Batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

TOKENIZER = byte_tokenizer()
CONFIG = GPTConfig(
    block_size=8, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1, n_embd=4, dropout=0.0
)


def classifier(n_labels: int = 2) -> Classifier:
    torch.manual_seed(0)
    return Classifier(CONFIG, n_labels)


def batch(rows: list[list[int]], labels: list[int], **step: float) -> Batch:
    input_ids, lengths = pad(rows)
    whole = {"step_targets": len(rows), "step_tokens": sum(len(row) - 1 for row in rows)}
    return {
        "input_ids": input_ids,
        "lengths": lengths,
        "labels": torch.tensor(labels),
        "row_seeds": torch.arange(len(rows)),
        **whole,
        **step,
    }


def module(model: Classifier) -> ClassifyModule:
    built = ClassifyModule(
        GPT(CONFIG),
        data=SimpleNamespace(labels=["a", "b"], weights=[9.0, 9.0]),
        label_smoothing=0.5,
        lm_weight=3.0,
        tokenizer=TOKENIZER,
        make_optimizer=adamw,
        schedule=Constant(),
        max_steps=1,
        tokens_per_step=8,
        grad_clip=None,
        compiled=False,
        metadata={},
    )
    built.model.load_state_dict(model.state_dict())
    return built


def validate(built: ClassifyModule, batches: list[Batch]) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    return trainer.validate(built, loader, verbose=False)[0]


def biased(*logits: float) -> Classifier:
    """A classifier with the same class logits for every text."""
    model = classifier(len(logits))
    with torch.no_grad():
        for name, tensor in model.ln_f.named_parameters():  # the last state of every text: its bias
            tensor.copy_(
                torch.eye(1, len(tensor))[0] if name == "bias" else torch.zeros(len(tensor))
            )
        model.classes.weight.zero_()[:, 0] = torch.tensor(logits)
    return model


def test_the_loss_is_summed_over_the_examples() -> None:
    loss = make_loss([1.0, 1.0])(biased(0.0, math.log(3)), batch([[1, 2], [3]], [0, 1]))
    assert loss.item() == pytest.approx(math.log(4) + math.log(4 / 3), abs=1e-6)


def test_class_weights_weigh_the_examples() -> None:
    loss = make_loss([2.0, 0.5])(biased(0.0, math.log(3)), batch([[1, 2], [3]], [0, 1]))
    assert loss.item() == pytest.approx(2 * math.log(4) + 0.5 * math.log(4 / 3), abs=1e-6)


def test_the_next_token_is_a_second_lesson_per_token() -> None:
    # With a zero table all tokens are equally likely: each of the 3 next tokens costs ln V, and
    # the step has 2 examples for its 3 tokens.
    model = biased(0.0, 0.0)
    torch.nn.init.zeros_(model.wte.weight)
    rows = batch([[1, 2, 3], [4, 5]], [0, 1])
    loss = make_loss([1.0, 1.0], lm_weight=0.5)(model, rows)
    expected = 2 * math.log(2) + 0.5 * (2 / 3) * 3 * math.log(CONFIG.vocab_size)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [make_loss([2.0, 0.5], 0.1, 0.7), make_loss([1.0, 1.0])])
def test_the_padding_of_a_micro_batch_changes_no_gradient(loss: Loss) -> None:
    rows, labels = [[1, 2, 3, 4, 5, 6], [7], [8, 9], [10, 11, 12]], [0, 1, 1, 0]
    gradients = []
    for size in (4, 2, 1):
        model = classifier()
        torch.nn.init.ones_(model.classes.weight)
        whole = {"step_targets": 4, "step_tokens": 8}
        for i in range(0, 4, size):
            micro_batch = batch(rows[i : i + size], labels[i : i + size], **whole)
            (loss(model, micro_batch) / 4).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


def test_validation_has_the_loss_and_the_share_of_hits() -> None:
    built = module(biased(0.0, math.log(3)))
    metrics = validate(built, [batch([[1, 2], [3]], [1, 1]), batch([[4]], [0])])
    assert metrics["val/accuracy"] == pytest.approx(2 / 3)
    assert metrics["val/loss"] == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3, abs=1e-6)


def test_an_example_that_is_not_scored_changes_no_metric() -> None:
    built = module(biased(0.0, math.log(3)))
    metrics = validate(built, [batch([[1, 2], [3]], [1, -100]), batch([[4]], [-100])])
    assert metrics["val/accuracy"] == 1
    assert metrics["val/loss"] == pytest.approx(math.log(4 / 3), abs=1e-6)


def test_validation_leaves_the_model_in_training_mode() -> None:
    built = module(biased(0.0, 0.0))
    validate(built, [batch([[1, 2]], [0])])
    assert built.model.training


@pytest.mark.parametrize("values", [{"label_smoothing": 1.0}, {"lm_weight": -0.1}])
def test_a_loss_that_cannot_be_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        make_loss([1.0, 1.0], **values)


def test_the_summary_has_both_test_sets_and_the_baselines() -> None:
    text_sets = {
        "train": (["good", "fine", "bad", "awful", "bad"], [0, 0, 1, 1, 1]),
        "test": (["good", "bad"], [0, 1]),
        "imbalanced": (["good", "fine", "good", "bad"], [0, 0, 0, 1]),
    }
    facts = measure(biased(1.0, 0.0), TOKENIZER, ["plus", "minus"], text_sets)
    assert (facts["test_accuracy"], facts["imbalanced_accuracy"]) == (0.5, 0.75)
    assert facts["test_macro_f1"] == pytest.approx(1 / 3)
    assert facts["confusion"] == [[1, 0], [1, 0]]
    assert facts["baseline_majority_imbalanced_accuracy"] == 0.25
    assert facts["baseline_bag_of_words_test_accuracy"] == 1.0
    assert facts["mistakes"] == [
        {
            "text": "bad",
            "label": "minus",
            "predicted": "plus",
            "probability": pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6),
        }
    ]


def test_the_surest_mistakes_come_first() -> None:
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
    shown = mistakes((["a", "b", "c"], [1, 1, 1]), probabilities, ["x", "y"])
    assert [mistake["text"] for mistake in shown] == ["b", "a"]


def summary(**changes: Any) -> dict[str, Any]:
    text_sets = {"train": (["good", "bad"], [0, 1]), "test": (["<good>", "bad"], [0, 1])}
    facts = measure(biased(0.0, 1.0), TOKENIZER, ["plus", "minus"], text_sets)
    return {**facts, **changes}


def report(run_dir: Path, facts: dict[str, Any]) -> str:
    """Return the report of a finished run with these facts in its summary."""
    (run_dir / "summary.json").write_text(json.dumps({"steps": 1, **facts}))
    return write_report(run_dir).read_text()


def test_the_report_has_scores_and_baselines_and_mistakes_as_text(tmp_path: Path) -> None:
    page = report(tmp_path, summary())
    assert '<th scope="col">this model</th><th scope="col">bag of words</th>' in page
    assert "test accuracy</th><td>50.0 %</td><td>100.0 %</td>" in page
    assert "imbalanced" not in page
    assert "&lt;good&gt;" in page
    assert "<good>" not in page


def test_the_confusion_has_a_cell_per_pair_shaded_by_its_share_of_the_row(tmp_path: Path) -> None:
    page = report(tmp_path, summary(labels=["a", "b & c"], confusion=[[3, 1], [0, 4]]))
    assert page.count('<td style="--share') == 4
    assert page.count("--share: 1.000") == 1  # all of a row in one cell
    row = '<th scope="row" title="b &amp; c">b &amp; c</th>\n'
    assert f'{row}<td style="--share: 0.000">0</td><td style="--share: 1.000">4</td>' in page


def test_of_many_classes_the_most_confused_are_shown(tmp_path: Path) -> None:
    labels = [f"class {i}" for i in range(25)]
    confusion = np.eye(25, dtype=int) * 9
    confusion[24, 23] = 5
    page = report(tmp_path, summary(labels=labels, confusion=confusion.tolist()))
    assert page.count('<td style="--share') == 20 * 20
    assert ">5</td><td" in page
    assert "6 others" in page
    assert '"class 24"' in page
    assert '"class 18"' not in page


def test_other_stages_have_no_section_on_classes(tmp_path: Path) -> None:
    assert "Classes" not in report(tmp_path, {"stage": "pretrain"})
