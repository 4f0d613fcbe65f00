"""Train a model: compose the configuration, build the objects, fit, report.

    python train.py                                      a small GPT on Python's sources, offline
    python train.py stage=pretrain model=gpt2_small      GPT-2 small on FineWeb-Edu
    python train.py stage=instruct                       the newest model learns to reply
    python train.py -m optim.learning_rate=1e-2,2e-2     a sweep
    torchrun --nproc_per_node=8 train.py trainer=ddp     eight GPUs

Issuing a command again continues its run. Every key is in conf/, with a comment.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and main() says it in one sentence
# Threads that spin for long while they wait make a step several times slower beside another busy
# program, threads that sleep at once make a small model's steps slower: see docs/PERFORMANCE.md.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no name service is no news

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanogpt.command import guard_output
from nanogpt.config import (
    CONF,
    ConfigurationError,
    as_overrides,
    build,
    build_optimizer,
    build_schedule,
    expand_environment,
    explain_composition,
    explain_failure,
    freeze,
    sweep_name,
)

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
STOPPED_BY_SIGNAL = (130, 143)

# Keys of data that its object does not have: how its documents become shards, and shards batches.
ABOUT_PREPARING = ("tokens", "shard_tokens")
ABOUT_BATCHES = ("workers", "prompts")
HEAD_START_S = 2.0  # of rank zero, which reports what it does, where a corpus is to be prepared

log = logging.getLogger("nanogpt")
failures: list[int] = []  # exit codes of this command's jobs


def main(arguments: Sequence[str]) -> int:
    """Run one job, a sweep, or with `--frozen FILE` one rank of a job; return the exit code."""
    guard_output()
    expand_environment()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for modules that the configuration names
    os.environ["NANOGPT_SWEEP"] = sweep_name(arguments)  # for hydra.sweep.dir
    sys.argv[1:] = as_overrides(arguments)
    try:
        if arguments[:1] == ["--frozen"]:
            run_job(yaml.safe_load(Path(arguments[1]).read_text(encoding="utf-8")), train)
        else:
            compose()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if "debug=true" in arguments:
            raise
        print(f"train.py: {explain_composition(error)}", file=sys.stderr)
        return WRONG_USAGE
    return max(failures, default=0)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def compose(cfg: DictConfig) -> float:
    """Run one composed job; return its validation loss, which a sweeper may minimise."""
    return run_job(OmegaConf.to_container(cfg, resolve=True), lambda _: start(freeze(cfg)))


def run_job(config: Any, job: Callable[[Any], Mapping[str, Any]]) -> float:
    """Run a job and return its validation loss; say why it failed, and let a sweep go on."""
    try:
        return float(job(config).get("val_loss", math.nan))
    except Exception as error:
        if config["debug"] is True:
            raise
        failures.append(WRONG_USAGE if isinstance(error, ConfigurationError) else FAILED)
        if text := explain_failure(error):
            print(f"train.py: {text}", file=sys.stderr)
        return math.nan


def start(config: dict[str, Any]) -> Mapping[str, Any]:
    """Train a frozen job here, or in as many processes as it asks for; return its summary."""
    from nanogpt.ranks import RankZeroFailedError, is_rank
    from nanogpt.runs.directory import RunDirectory
    from nanogpt.training.launch import count_devices, launch

    trainer = config["trainer"]
    if is_rank():
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise ValueError(
                "torchrun cannot run a sweep (every rank would run all of it); "
                "start it as python train.py -m ... trainer=ddp trainer.devices=N"
            )
        return train(config)
    if trainer["num_nodes"] > 1:
        raise ValueError(
            f"trainer.num_nodes={trainer['num_nodes']} needs torchrun on every node: "
            f"torchrun --nnodes={trainer['num_nodes']} --nproc_per_node=GPUS train.py ..."
        )
    n_processes = count_devices(trainer["devices"], trainer["accelerator"])
    if n_processes == 1:
        return train(config)
    code = launch(config, n_processes)
    if code in STOPPED_BY_SIGNAL:
        raise SystemExit(code)
    if code:
        raise RankZeroFailedError  # and has said why
    return RunDirectory.of(config).summary() or {}


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Train one run on this rank, or find it finished; return its summary."""
    from nanogpt.training.session import Session

    check_objects(config)
    schedule = build_schedule(config["schedule"])
    with Session(config, schedule, stage_source(config).fingerprint) as session:
        if session.finished is not None:
            return session.finished
        return STAGES[config["stage"]](config, session, session.starting_point())


def check_objects(config: Mapping[str, Any]) -> None:
    """Build what needs neither data nor device; a wrong value then fails before anything else."""
    from nanogpt.model import GPT, GPTConfig
    from nanogpt.prompts import find_template

    GPTConfig(**config["model"], vocab_size=1)
    smallest = GPTConfig(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=2)
    make_optimizer, _ = optimizer_settings(config)
    make_optimizer(GPT(smallest))
    if config["stage"] == "instruct":
        find_template(config["instruct"]["template"])
    if config["stage"] == "classify":
        make_loss, _ = build_loss(config)
        make_loss([1.0])


def pretrain(config: dict[str, Any], session: Any, init: Any) -> dict[str, Any]:
    """Train a language model on a corpus, from random weights or from `init`."""
    import torch

    from nanogpt.data.corpus import find_corpus
    from nanogpt.data.module import TokenDataModule, split_step
    from nanogpt.model import GPT, GPTConfig

    block_size = config["model"]["block_size"] if init is None else init.config.block_size
    rows_per_rank = split_step(config["tokens_per_step"], block_size, session.ranks.world_size)
    corpus = find_corpus(Path(config["data_dir"]), session.prepared) or build_corpus(
        config, None if init is None else init.tokenizer, session.ranks.rank
    )
    if splits := corpus.manifest.get("splits"):
        n_train, n_val = (f"{splits[name]['tokens']:,}" for name in ("train", "val"))
        log.info("data %s: %s training and %s validation tokens", corpus.directory, n_train, n_val)
    tokenizer = corpus.tokenizer
    model_config = (
        GPTConfig(**config["model"], vocab_size=tokenizer.vocab_size)
        if init is None
        else init.config
    )
    decisions = session.settle(model_config, rows_per_rank, corpus.fingerprint, init)
    torch.manual_seed(config["seed"])
    model = GPT(model_config) if init is None else init.model
    module = language_module(config, session, decisions, model, tokenizer)
    data = TokenDataModule(
        corpus,
        block_size=model_config.block_size,
        tokens_per_step=config["tokens_per_step"],
        micro_batch=decisions.micro_batch,
        seed=config["seed"],
        workers=config["data"]["workers"],
    )
    facts = {"gzip_bits_per_byte": corpus.manifest.get("gzip_bits_per_byte")}
    return session.fit(module, data, tokenizer, data.val_dataloader, facts)


def instruct(config: dict[str, Any], session: Any, init: Any) -> dict[str, Any]:
    """Teach a language model to reply as the responses of a data set do."""
    import torch

    from nanogpt.checkpoint import with_special_tokens
    from nanogpt.data.instruction_module import InstructionDataModule, pack_conversations
    from nanogpt.data.instructions import text_of
    from nanogpt.data.module import split_step
    from nanogpt.model import GPT, GPTConfig
    from nanogpt.prompts import find_template

    template = find_template(config["instruct"]["template"])
    block_size = config["model"]["block_size"] if init is None else init.config.block_size
    rows_per_rank = split_step(config["tokens_per_step"], block_size, session.ranks.world_size)
    splits = stage_source(config).splits()
    if init is None:
        make_tokenizer = instantiate(config["tokenizer"], _partial_=True, _convert_="all")
        tokenizer = make_tokenizer(map(text_of, splits.train))
        tokenizer = tokenizer.with_special_tokens(template.special_tokens)
        model_config = GPTConfig(**config["model"], vocab_size=tokenizer.vocab_size)
    else:
        named = with_special_tokens(init, template.special_tokens)
        tokenizer, model_config = named.tokenizer, named.config
    loss_on = config["instruct"]["loss_on"]
    packed = pack_conversations(splits, template, tokenizer, block_size, loss_on)
    if (passes := passes_of(config)) is not None:
        session.end_by(packed.steps_of(passes, config["tokens_per_step"]))
    packed.tell_passes(session.max_steps, config["tokens_per_step"])
    decisions = session.settle(model_config, rows_per_rank, packed.fingerprint, init)
    torch.manual_seed(config["seed"])
    model = GPT(model_config) if init is None else named.model
    module = language_module(config, session, decisions, model, tokenizer, template.name)
    data = InstructionDataModule(
        packed,
        tokens_per_step=config["tokens_per_step"],
        micro_batch=decisions.micro_batch,
        seed=config["seed"],
        workers=config["data"]["workers"],
    )
    facts = {"template": template.name, "loss_on": loss_on, **packed.facts()}
    return session.fit(module, data, tokenizer, data.val_dataloader, facts)


def passes_of(config: Mapping[str, Any]) -> int | None:
    """Return after how many passes over the data the run ends, None where a budget was typed."""
    typed = {"max_steps", "max_tokens"} & config["typed"].keys()
    passes: int | None = config["instruct"]["max_passes"]
    return None if typed else passes


def language_module(
    config: Mapping[str, Any],
    session: Any,
    decisions: Any,
    model: Any,
    tokenizer: Any,
    template: str | None = None,
) -> Any:
    """Return the module that trains a language model."""
    from nanogpt.checkpoint import record
    from nanogpt.training.pretrain import PretrainModule
    from nanogpt.training.throughput import flops_per_token

    make_optimizer, grad_clip = optimizer_settings(config)
    about = record(
        config["stage"], model.config, tokenizer, template=template, init_from=session.init_from
    )
    return PretrainModule(
        model.train(),
        make_optimizer=make_optimizer,
        schedule=session.schedule,
        max_steps=session.max_steps,
        tokens_per_step=config["tokens_per_step"],
        grad_clip=grad_clip,
        compiled=decisions.compile,
        record=about,
        token_bytes=[len(token) for token in tokenizer.token_bytes()],
        flops_per_token=flops_per_token(model.config),
        peak_flops=decisions.peak_flops,
    )


def classify(config: dict[str, Any], session: Any, init: Any) -> dict[str, Any]:
    """Teach a model the classes of labelled texts, and test it on texts that it has not seen."""
    import torch

    from nanogpt.checkpoint import record
    from nanogpt.classifier import Classifier, train_layers
    from nanogpt.data.labelled_module import LabelledDataModule
    from nanogpt.data.module import split_step
    from nanogpt.data.splits import class_weights
    from nanogpt.model import GPTConfig
    from nanogpt.training.classify import ClassifyModule, measure

    make_loss, noise = build_loss(config)
    layers, weighted = (config["classify"][key] for key in ("layers", "class_weights"))
    block_size = config["model"]["block_size"] if init is None else init.config.block_size
    rows_per_rank = split_step(config["tokens_per_step"], block_size, session.ranks.world_size)
    splits = stage_source(config).splits()
    labels = splits.labels
    if init is None:
        make_tokenizer = instantiate(config["tokenizer"], _partial_=True, _convert_="all")
        tokenizer = make_tokenizer(example.text for example in splits.train)
        model_config = GPTConfig(**config["model"], vocab_size=tokenizer.vocab_size)
    else:
        tokenizer, model_config = init.tokenizer, init.config
    decisions = session.settle(model_config, rows_per_rank, splits.fingerprint, init)
    torch.manual_seed(config["seed"])
    model = (
        Classifier(model_config, len(labels))
        if init is None
        else Classifier.from_model(init.model, len(labels))
    )
    train_layers(model, layers)
    weights = class_weights(splits.train, labels) if weighted else [1.0] * len(labels)
    make_optimizer, grad_clip = optimizer_settings(config)
    module = ClassifyModule(
        model.train(),
        make_optimizer=make_optimizer,
        schedule=session.schedule,
        max_steps=session.max_steps,
        tokens_per_step=config["tokens_per_step"],
        grad_clip=grad_clip,
        compiled=decisions.compile,
        record=record(
            "classify", model_config, tokenizer, labels=labels, init_from=session.init_from
        ),
        loss=make_loss(weights),
        measure=partial(measure, tokenizer=tokenizer, labels=labels, text_sets=splits.text_sets()),
    )
    data = LabelledDataModule(
        splits,
        tokenizer,
        class_weights=weights,
        noise=noise,
        block_size=block_size,
        tokens_per_step=config["tokens_per_step"],
        micro_batch=decisions.micro_batch,
        seed=config["seed"],
        workers=config["data"]["workers"],
    )
    return session.fit(module, data, tokenizer, data.val_dataloader, splits.facts())


def build_loss(config: Mapping[str, Any]) -> tuple[Callable[[list[float]], Any], Any]:
    """Return what makes a classifier's loss of class weights, and the augmentation of its texts."""
    from nanogpt.data.labelled_module import Noise
    from nanogpt.training.classify import Loss

    node = dict(config["classify"])
    noise = Noise(**{key: node.pop(key) for key in ("recase", "token_split", "token_dropout")})
    del node["layers"], node["class_weights"]
    return partial(Loss, **node), noise


def optimizer_settings(config: Mapping[str, Any]) -> tuple[Callable[[Any], Any], float | None]:
    """Return what makes the configured optimizer of a model, and the norm to clip gradients to."""
    return partial(build_optimizer, config["optim"]), config["grad_clip"]


def build_corpus(config: Mapping[str, Any], tokenizer: Any, rank: int) -> Any:
    """Return the configured corpus, prepared, with the given tokenizer or else the configured."""
    from nanogpt.data.preparing import Preparation, prepare
    from nanogpt.data.pretokenized import TokenShards, fetch_pretokenized

    source, preparing = build_source(config["data"])
    data_dir = Path(config["data_dir"])
    if pretokenized := config["data"].get("pretokenized"):
        source = TokenShards(fetch_pretokenized(pretokenized, data_dir), source.val_fraction)
    key = tokenizer_key(config["tokenizer"]) if tokenizer is None else tokenizer.fingerprint
    make_tokenizer = (
        instantiate(config["tokenizer"], _partial_=True, _convert_="all")
        if tokenizer is None
        else partial(given, tokenizer)
    )
    if isinstance(source, TokenShards):
        learnt = "vocab_size" in config["tokenizer"] and tokenizer is None
        return source.open(None if learnt else make_tokenizer(()), key)
    preparation = Preparation(source, make_tokenizer, key, data_dir, **preparing)
    if rank > 0 and not preparation.directory.exists():
        time.sleep(HEAD_START_S)
    return prepare(preparation)


def build_source(node: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what yields the documents, and the keys that say how they are prepared."""
    preparing = {key: node[key] for key in ABOUT_PREPARING if key in node}
    leaf = {k: v for k, v in node.items() if k not in (*ABOUT_PREPARING, *ABOUT_BATCHES)}
    return build(leaf, "data"), preparing


def stage_source(config: Mapping[str, Any]) -> Any:
    """Return the configured data set, where it is of the kind that the stage learns from."""
    from nanogpt.data.instructions import Instructions
    from nanogpt.data.labelled import LabelledTexts

    if config["stage"] == "pretrain":
        return build_source(config["data"])[0]
    if config["stage"] == "instruct":
        return build_examples(
            config["data"],
            Instructions,
            "stage=instruct learns from conversations and data={} has none",
            "data=dolly, or data=instructions data.path=<a .jsonl of instructions and responses>",
        )
    return build_examples(
        config["data"],
        LabelledTexts,
        "stage=classify learns from labelled texts and data={} has no labels",
        "data=sms_spam, or data=labelled data.path=<a .tsv, .csv or .jsonl file>",
    )


def build_examples(node: Mapping[str, Any], kind: type, learns_from: str, instead: str) -> Any:
    """Return the configured data set, where it is of the kind that a stage learns from."""
    source, _ = build_source(node)
    if not isinstance(source, kind):
        raise ValueError(f"{learns_from.format(source.name)}; pass {instead}")
    return source


def given(tokenizer: Any, documents: Any) -> Any:
    """Return a tokenizer that need not be learnt."""
    return tokenizer


def tokenizer_key(node: Mapping[str, Any]) -> str:
    """Return what names a configured tokenizer's table among prepared data, such as bpe-2048."""
    maker = node["_target_"].rpartition(".")[2].removesuffix("_tokenizer")
    return "-".join([maker, *(str(value) for key, value in node.items() if key != "_target_")])


STAGES = {"pretrain": pretrain, "classify": classify, "instruct": instruct}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
