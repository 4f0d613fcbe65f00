"""How well a checkpoint does: one small file per kind of measure.

    scoring.py         how likely texts are after others, batched: what most measures stand on
    hellaswag.py, lambada.py, perplexity.py      language models
    instructions.py                              instruction-tuned models
    classification.py                            classifiers
    harness.py         any task of lm-evaluation-harness, on our checkpoints
    examples.py        benchmark files, here or on the Hugging Face hub
    results.py         the table, and the record of a run's evaluations

A task is a function `evaluate` from a checkpoint to metrics by name; `nanogpt/evaluate.py` has the
table of tasks.
"""
