"""Separate SMS spam by the embeddings of a server, and by tf-idf of words.

    python benchmarks/embeddings.py http://127.0.0.1:5001/v1 --data SMSSpamCollection [--seeds 5]

Each seed draws as many ham as spam messages, and of these a fifth for the test. Logistic regression
has the same training texts of both features; its penalty is chosen on a fifth of them. Embeddings
are standardised by the training texts; words of one training text alone are left out of tf-idf. Of
a message both see the first 120 characters.
"""

import argparse
import re
import statistics
from collections import Counter
from pathlib import Path

import httpx
import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def main() -> int:
    """Print the accuracy of each seed, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="base URL, with /v1")
    parser.add_argument("--data", type=Path, required=True, help="the file SMSSpamCollection")
    parser.add_argument("--model", default="", help="id of the model")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rows = [line.split("\t", 1) for line in options.data.read_text("utf-8").split("\n") if line]
    is_spam = torch.tensor([label == "spam" for label, _ in rows])
    found: dict[str, list[float]] = {"embeddings": [], "tf-idf": []}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        spam, ham = is_spam.nonzero().flatten(), (~is_spam).nonzero().flatten()
        drawn = torch.cat([spam, ham[torch.randperm(len(ham))[: len(spam)]]])
        drawn = drawn[torch.randperm(len(drawn))]
        n_train, targets = len(drawn) * 4 // 5, is_spam[drawn].float()
        texts = [rows[i][1][:120] for i in drawn.tolist()]
        x = embed(options.url, options.model, texts)
        x = (x - x[:n_train].mean(0)) / x[:n_train].std(0)
        by_words = tf_idf([re.findall(r"\w+", text.lower()) for text in texts], n_train)
        for name, features in (("embeddings", x), ("tf-idf", by_words)):
            found[name].append(100 * accuracy(features, targets, n_train))
        print(
            f"seed {seed}: " + ", ".join(f"{name} {own[-1]:.2f} %" for name, own in found.items())
        )
    for name, own in found.items():
        print(f"{name}: {statistics.mean(own):.2f} +- {statistics.pstdev(own):.2f} %")
    return 0


def embed(url: str, model: str, texts: list[str]) -> Tensor:
    """Return the embeddings (N, C) float32 of texts."""
    vectors = []
    for start in range(0, len(texts), 500):
        body = {"model": model, "input": texts[start : start + 500]}
        answer = httpx.post(f"{url}/embeddings", json=body, timeout=600).raise_for_status().json()
        vectors += [item["embedding"] for item in answer["data"]]
    return torch.tensor(vectors)


def tf_idf(texts: list[list[str]], n_train: int) -> Tensor:
    """Return rows (N, V) of length 1; the first `n_train` texts have the vocabulary."""
    n_texts = Counter(word for text in texts[:n_train] for word in set(text))
    known = {word: i for i, word in enumerate(w for w, n in n_texts.items() if n > 1)}
    counts = torch.zeros(len(texts), len(known))
    for row, text in zip(counts, texts, strict=True):
        for word in text:
            if word in known:
                row[known[word]] += 1
    idf = torch.tensor([n_train / n_texts[word] for word in known]).log() + 1
    return F.normalize(counts * idf)


def accuracy(x: Tensor, targets: Tensor, n_train: int) -> float:
    """Return the share of right labels of the texts after the first `n_train`."""
    n_fit = n_train * 4 // 5
    scores = {p: right(fit(x[:n_fit], targets, p), x, targets, n_fit, n_train) for p in PENALTIES}
    best = max(scores, key=lambda penalty: scores[penalty])
    return right(fit(x[:n_train], targets, best), x, targets, n_train, len(x))


def fit(x: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Return the weights (F + 1,) of logistic regression on rows (N, F), the bias last."""
    weights = torch.zeros(x.size(1) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        loss = F.binary_cross_entropy_with_logits(logits, targets[: len(x)])
        loss = loss + penalty * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def right(weights: Tensor, x: Tensor, targets: Tensor, start: int, end: int) -> float:
    """Return the share of right labels of the texts from `start` to `end`."""
    predicted = x[start:end] @ weights[:-1] + weights[-1] > 0
    return (predicted == targets[start:end].bool()).float().mean().item()


if __name__ == "__main__":
    raise SystemExit(main())
