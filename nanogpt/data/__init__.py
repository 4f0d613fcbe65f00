"""Data: documents become token shards once, and shards become batches in a fixed order.

    source.py      the interface of a data set: an object that yields documents
    python_stdlib.py, text.py, hub.py, fineweb_edu.py, ...   one data set each
    records.py     lines and records of files, and their errors
    files.py       documents of parquet, JSON Lines and text files, local or on the hub
    preparing.py   prepare(): a corpus made once, continued after a kill, found again later
    tokenizing.py  documents split, batched, tokenized on all cores, in order
    writer.py      the shards as they grow, and the journal to continue from
    corpus.py      a prepared corpus: shards, tokenizer and manifest, verified when opened
    pretokenized.py      token shards of other projects
    shards.py      the shard format, and a stream of tokens over many shards
    order.py       the row at each step of training: a pure function
    windows.py     rows of a stream as inputs and targets
    module.py      the Lightning data module: batches for every rank, step by step
    instructions.py, dolly.py, packing.py, instruction_module.py    conversations in packed rows
    labelled.py, sms_spam.py, splits.py, labelled_module.py         labelled texts of classes

A new data set is one file here and one YAML in conf/data; outside the repository, one file and one
YAML of a package of one's own (docs/EXTENDING.md).
"""
