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

# Keys of data that its object does not have: those of the corpus, and others'.
OF_CORPUS = ("tokens", "shard_tokens", "pretokenized")
OF_OTHERS = ("workers", "prompts")

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
    with Session(config, schedule, build_source(config["data"]).fingerprint) as session:
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

    from nanogpt.data.module import split_step
    from nanogpt.model import GPT, GPTConfig

    block_size = config["model"]["block_size"] if init is None else init.config.block_size
    rows_per_rank = split_step(config["tokens_per_step"], block_size, session.ranks.world_size)
    node = {key: config["data"][key] for key in OF_CORPUS if key in config["data"]}
    data = build(
        {"_target_": "nanogpt.data.module.CorpusDataModule", **node},
        "data",
        prepared=session.prepared,
        **live(config, block_size),
    )
    tokenizer = data.use_tokenizer(tokenizer_choice(config, init and init.tokenizer))
    model_config = (
        GPTConfig(**config["model"], vocab_size=tokenizer.vocab_size)
        if init is None
        else init.config
    )
    decisions = session.settle(model_config, rows_per_rank, data.fingerprint, init)
    data.micro_batch = decisions.micro_batch
    torch.manual_seed(config["seed"])
    model = GPT(model_config) if init is None else init.model
    module = language_module(config, session, decisions, model, tokenizer)
    return session.fit(module, data, tokenizer, data.validation, data.facts())


def instruct(config: dict[str, Any], session: Any, init: Any) -> dict[str, Any]:
    """Teach a language model to reply as the responses of a data set do."""
    import torch

    from nanogpt.checkpoint import with_special_tokens
    from nanogpt.data.module import split_step
    from nanogpt.model import GPT, GPTConfig

    block_size = config["model"]["block_size"] if init is None else init.config.block_size
    rows_per_rank = split_step(config["tokens_per_step"], block_size, session.ranks.world_size)
    target = "nanogpt.data.instruction_module.InstructionDataModule"
    data = build({"_target_": target, **config["instruct"]}, "instruct", **live(config, block_size))
    if init is not None:
        init = with_special_tokens(init, data.special_tokens)
    tokenizer = data.use_tokenizer(tokenizer_choice(config, init and init.tokenizer))
    model_config = (
        GPTConfig(**config["model"], vocab_size=tokenizer.vocab_size)
        if init is None
        else init.config
    )
    if data.max_steps is not None and not {"max_steps", "max_tokens"} & config["typed"].keys():
        session.end_by(data.max_steps)
    decisions = session.settle(model_config, rows_per_rank, data.fingerprint, init)
    data.micro_batch = decisions.micro_batch
    torch.manual_seed(config["seed"])
    model = GPT(model_config) if init is None else init.model
    module = language_module(config, session, decisions, model, tokenizer, data.template.name)
    return session.fit(module, data, tokenizer, data.validation, data.facts())


def live(config: Mapping[str, Any], block_size: int) -> dict[str, Any]:
    """Return what data modules take besides their own keys."""
    return {
        "source": build_source(config["data"]),
        "data_dir": config["data_dir"],
        "block_size": block_size,
        "tokens_per_step": config["tokens_per_step"],
        "seed": config["seed"],
        "workers": config["data"]["workers"],
    }


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
    from nanogpt.data.module import split_step
    from nanogpt.model import GPTConfig
    from nanogpt.training.classify import ClassifyModule, measure

    make_loss, augmentation = build_loss(config)
    block_size = config["model"]["block_size"] if init is None else init.config.block_size
    rows_per_rank = split_step(config["tokens_per_step"], block_size, session.ranks.world_size)
    target = "nanogpt.data.labelled_module.LabelledDataModule"
    data = build({"_target_": target, **augmentation}, "classify", **live(config, block_size))
    tokenizer = data.use_tokenizer(tokenizer_choice(config, init and init.tokenizer))
    labels = data.labels
    model_config = (
        GPTConfig(**config["model"], vocab_size=tokenizer.vocab_size)
        if init is None
        else init.config
    )
    decisions = session.settle(model_config, rows_per_rank, data.fingerprint, init)
    data.micro_batch = decisions.micro_batch
    torch.manual_seed(config["seed"])
    model = (
        Classifier(model_config, len(labels))
        if init is None
        else Classifier.from_model(init.model, len(labels))
    )
    train_layers(model, config["classify"]["layers"])
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
        loss=make_loss(data.class_weights),
        measure=partial(measure, tokenizer=tokenizer, labels=labels, text_sets=data.text_sets()),
    )
    return session.fit(module, data, tokenizer, data.validation, data.facts())


def build_loss(config: Mapping[str, Any]) -> tuple[Callable[[list[float]], Any], Any]:
    """Return what makes a classifier's loss of class weights, and the data module's keys."""
    from nanogpt.training.classify import Loss

    node = dict(config["classify"])
    of_data = ("recase", "token_split", "token_dropout", "class_weights")
    augmentation = {key: node.pop(key) for key in of_data}
    del node["layers"]
    return partial(Loss, **node), augmentation


def optimizer_settings(config: Mapping[str, Any]) -> tuple[Callable[[Any], Any], float | None]:
    """Return what makes the configured optimizer of a model, and the norm to clip gradients to."""
    return partial(build_optimizer, config["optim"]), config["grad_clip"]


def build_source(node: Mapping[str, Any]) -> Any:
    """Return the configured data set."""
    keys = {k: v for k, v in node.items() if k not in (*OF_CORPUS, *OF_OTHERS)}
    return build(keys, "data")


def tokenizer_choice(config: Mapping[str, Any], tokenizer: Any) -> Any:
    """Return the given tokenizer as a choice, the configured one where there is none."""
    from nanogpt.data.module import TokenizerChoice

    if tokenizer is not None:
        return TokenizerChoice.of(tokenizer)
    make = instantiate(config["tokenizer"], _partial_=True, _convert_="all")
    return TokenizerChoice(make, tokenizer_key(config["tokenizer"]))


def tokenizer_key(node: Mapping[str, Any]) -> str:
    """Return what names a configured tokenizer's table among prepared data, such as bpe-2048."""
    maker = node["_target_"].rpartition(".")[2].removesuffix("_tokenizer")
    return "-".join([maker, *(str(value) for key, value in node.items() if key != "_target_")])


STAGES = {"pretrain": pretrain, "classify": classify, "instruct": instruct}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
