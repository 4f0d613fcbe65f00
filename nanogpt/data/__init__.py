"""Data: documents become token shards once, and shards become batches in a fixed order.

    source.py      what a data set is: an object that yields documents
    python_stdlib.py, text.py, ...   one data set each
    corpus.py      prepare(): split, tokenize, write shards and a manifest; found again later
    shards.py      the shard format, and a stream of tokens over many shards
    order.py       which row the training sees at which step: a pure function
    windows.py     rows of a stream as inputs and targets
    module.py      the Lightning data module: batches for every rank, step by step

A new data set is one file here and one YAML in conf/data.
"""
