"""How well a checkpoint does: one small file per kind of measure.

    scoring.py         how likely texts are after others, batched: what most measures stand on
    hellaswag.py, lambada.py, perplexity.py      language models
    instructions.py, judge.py                    models that were taught to reply
    classification.py                            classifiers
    harness.py         any task of lm-evaluation-harness, on our checkpoints
    examples.py        benchmark files, here or on the Hugging Face hub
    processes.py       several processes that share the work
    results.py, picture.py                       one table, one picture, the run's own record

A task is a function from a checkpoint and the command's options to figures by name: `tasks.py`.
"""
