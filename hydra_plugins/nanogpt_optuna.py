"""The sweeper of conf/hparams_search/optuna.yaml; Hydra accepts plugins of this package alone.

A trial is recorded with its parameters before it runs, and an interrupted one runs again with the
same, which continues its run. A sampler is seeded by the number of trials before: a search that was
killed and repeated has the trials of one that was not.
"""

import math
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from nanogpt.build import build
from nanogpt.config import as_overrides
from nanogpt.runs.directory import lock_run
from nanogpt.runs.identity import is_identity
from nanogpt.runs.log import print_text
from nanogpt.values import Count, check

FAILURES_IN_A_ROW = 3  # which end a search


class OptunaSweeper(Sweeper):
    """Jobs whose overrides `params` vary, and those of the command line, which come first."""

    def __init__(self, n_trials: int, sampler: Any, params: Mapping[str, Any] | None) -> None:
        self.n_trials, self.sampler, self.params = n_trials, sampler or {}, params or {}

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.loader, self.directory = hydra_context.config_loader, Path(config.hydra.sweep.dir)
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until `n_trials` have finished, those of earlier calls included.

        Raises ValueError where nothing varies, or in a way that Optuna lacks, where another process
        runs the search, and after three failures in a row.
        """
        check({"n_trials": self.n_trials}, {"n_trials": Count}, "hydra.sweeper")
        if find_spec("optuna") is None:
            raise ValueError("hparams_search=optuna needs Optuna; pip install -e '.[sweep]'")
        words = as_overrides(["-m", *(f"{key}={value}" for key, value in self.params.items())])[1:]
        parsed = OverridesParser.create(self.loader).parse_overrides([*words, *arguments])
        overrides = {override.key_or_group: override for override in parsed}
        space = {k: distribution(o) for k, o in overrides.items() if o.is_sweep_override()}
        if not space:
            example = "'optim.learning_rate=tag(log,interval(1e-3,1e-1))' or model.n_layer=2,4"
            raise ValueError(f"no parameter varies; pass one such as {example}")
        self.directory.mkdir(parents=True, exist_ok=True)
        with lock_run(self.directory):
            self._search(overrides, space)

    def _search(self, overrides: Mapping[str, Override], space: Mapping[str, Any]) -> None:
        import optuna
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        of_study = {k: o for k, o in overrides.items() if is_identity(k) or k == "data.path"}
        name = " ".join(sorted(str(override.input_line) for override in of_study.values()))
        storage = f"sqlite:///{self.directory / 'optuna.db'}"
        study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
        n_failed = 0
        while (n_done := len(study.get_trials(states=[TrialState.COMPLETE]))) < self.n_trials:
            begun = [trial for trial in study.get_trials() if trial.params.keys() == space.keys()]
            interrupted = [trial for trial in begun if trial.state == TrialState.RUNNING]
            seed = (self.sampler.get("seed") or 0) + len(begun)
            study.sampler = build({**self.sampler, "seed": seed}, "hydra.sweeper.sampler")
            trial: Any = interrupted[0] if interrupted else study.ask(dict(space))
            words = {k: f"{overrides[k].get_key_element()}={v}" for k, v in trial.params.items()}
            done = f"{n_done} of {self.n_trials} finished"
            pairs = " ".join(words.values()).replace("++", "")
            print_text(f"trial {trial.number}, {done}: {pairs}")
            job = {k: str(override.input_line) for k, override in overrides.items()} | words
            value = self.launcher.launch([[*job.values()]], initial_job_idx=0)[0].return_value
            failed = not math.isfinite(value)
            state = TrialState.FAIL if failed else TrialState.COMPLETE
            study.tell(trial.number, None if failed else value, state=state)
            n_failed = n_failed + 1 if failed else 0
            if n_failed == FAILURES_IN_A_ROW:
                what = f"{n_failed} trials in a row failed, {done}"
                raise ValueError(f"{what}; correct the configuration and repeat the command")
        write_results(study, self.directory)


def distribution(override: Override) -> Any:
    """Return how Optuna draws a parameter. Raises ValueError where it cannot."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if override.is_choice_sweep():
        return CategoricalDistribution([*override.sweep_string_iterator()])
    value: Any = override.value()
    options = {"log": "log" in value.tags}
    ends = [value.start, getattr(value, "end", None)]
    if override.is_range_sweep():
        ends = sorted(round(v, 12) for v in value.range()) or [value.start, value.stop]
        options["step"] = abs(value.step)
    kind: Any = IntDistribution if isinstance(ends[0], int) else FloatDistribution
    try:
        return kind(ends[0], ends[-1], **options)
    except ValueError as error:
        raise ValueError(f"{override.input_line}: {error}") from error


def write_results(study: Any, directory: Path) -> None:
    """Write trials.csv, best first, and Optuna's pictures of a study."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as pictures

    table = study.trials_dataframe(("number", "value", "params", "state")).sort_values("value")
    table.to_csv(directory / "trials.csv", index=False)
    best = f"trial {study.best_trial.number} with {study.best_value:.4f}"
    print_text(f"best: {best}; all: {directory / 'trials.csv'}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are experimental
        for draw in (pictures.plot_optimization_history, pictures.plot_slice):
            pyplot.switch_backend("Agg")  # which needs no display, and closes the last picture
            draw(study)
            path = directory / f"{draw.__name__.removeprefix('plot_')}.svg"
            pyplot.savefig(path, bbox_inches="tight")
            print_text(f"picture: {path}")
