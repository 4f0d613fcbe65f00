"""Data: documents become token shards once, and shards become batches in a fixed order.

    source.py      what a data set is: an object that yields documents
    python_stdlib.py, text.py, hub.py, fineweb_edu.py, ...   one data set each
    records.py     lines and records of files, and what is wrong with bad ones
    files.py       documents of parquet, JSON Lines and text files, here or on the hub
    preparing.py   prepare(): made once, continued after a kill, found again later
    tokenizing.py  documents split, batched, tokenized on all cores, in order
    writer.py      the shards as they grow, and the journal to continue from
    meter.py       what a person sees meanwhile
    corpus.py      what was prepared: shards, tokenizer and manifest, verified when opened
    pretokenized.py, foreign.py      shards that others have made
    shards.py      the shard format, and a stream of tokens over many shards
    order.py       which row the training sees at which step: a pure function
    windows.py     rows of a stream as inputs and targets
    module.py      the Lightning data module: batches for every rank, step by step
    labelled.py, sms_spam.py         examples with labels, a data set or kind of file each
    splits.py, labelled_module.py    their splits without copies across, and their batches

A new data set is one file here and one YAML in conf/data; outside the repository, one file and one
YAML of a package of one's own (docs/EXTENDING.md).
"""
