"""Sweeps: one configuration with several settings, each trained with the same seeds.

A sweep's folder holds the list of its trials (journal.log, which is Optuna's) and an ordinary run
folder for each trial and seed, which says how far it is. Processes that see the folder share the
work: each takes the first run that is not finished and that nobody trains. The lock of a run folder
ends with its process, so that the runs of one that was killed are taken up again.
"""

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from gptcli import atomic, locking
from gptcli.api.train import ready, train
from gptcli.config import Config, load_config
from gptcli.config.space import Swept, Value, n_points, point
from gptcli.config.yaml import dump_yaml, flow
from gptcli.errors import (
    ConfigError,
    DataError,
    GptError,
    NonFiniteError,
    RunLockedError,
    is_out_of_memory,
)
from gptcli.evaluation.metrics import mean_and_margin
from gptcli.formatting import loss
from gptcli.plotting.figure import draw_sweep
from gptcli.runs.folder import Run
from gptcli.runs.read import flatten
from gptcli.training.events import Event, summary_of
from gptcli.training.spec import settle

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

OnEvent = Callable[[Event], None]

JOURNAL, BEST, PICTURE = "journal.log", "best.yaml", "sweep.svg"
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Trial:
    """One point of a sweep; losses are those at the ends of its runs, nats per token.

    Attributes:
        losses: By seed; None if not yet known, infinity if a loss was not finite.
        error: Why these settings cannot be trained.
        mean: Over all seeds; `margin` is half of its 95% interval, not a number for one seed.
        above: Mean difference from the best trial, seed by seed, with its margin.
        verdict: best, worse, not distinguishable (from the best), not finite, failed, unfinished;
            empty where a single seed cannot tell.
    """

    number: int
    settings: dict[str, Value]
    losses: dict[int, float | None]
    error: str | None = None
    mean: float | None = None
    margin: float | None = None
    above: float | None = None
    above_margin: float | None = None
    verdict: str = "unfinished"


def rank(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials with their statistics, the lowest mean loss first."""
    finite, others = list[Trial](), list[Trial]()
    for one in trials:
        known = [value for value in one.losses.values() if value is not None]
        if one.error is not None:
            others.append(replace(one, verdict="failed"))
        elif len(known) < len(one.losses):
            others.append(one)
        elif math.isfinite(sum(known)):
            mean, margin = mean_and_margin(known)
            finite.append(replace(one, mean=mean, margin=margin))
        else:
            others.append(replace(one, verdict="not finite"))
    finite.sort(key=lambda one: one.mean or 0.0)
    others.sort(key=lambda one: ("not finite", "failed", "unfinished").index(one.verdict))
    for index, one in enumerate(finite):
        pairs = zip(one.losses.values(), finite[0].losses.values(), strict=True)
        above, margin = mean_and_margin([(a or 0.0) - (b or 0.0) for a, b in pairs])
        verdict = "worse" if above > margin else "not distinguishable"
        verdict = "best" if index == 0 else "" if math.isnan(margin) else verdict
        finite[index] = replace(one, above=above, above_margin=margin, verdict=verdict)
    return finite + others


class Sweep:
    """A sweep, and this process's part in its work.

    Attributes:
        folder: The `run_dir` of its configuration, or runs/<name>-sweep.
        exit_code: Of the signal that stopped this process's part; None without one.
    """

    def __init__(
        self, base: Config, space: Sequence[Swept], trials: int | None = None, seeds: int = 3
    ) -> None:
        """Begin a sweep, or continue the one in its folder.

        Trials are 20, or every combination of choices, unless `trials` says how many. Each is run
        with `seeds` seeds, from that of `base` up.
        """
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError("gpt sweep needs optuna", "install it: pip install 'gptcli[sweep]'")
        if base.train.stop_after is not None:
            why = "train.stop_after ends a run before its schedule; a sweep compares whole ones"
            raise ConfigError(why, "-s train.stop_after=null")
        if not 0 < seeds <= _MOST_SEEDS:
            raise ConfigError(f"a sweep with {seeds:,} seeds; 1 to {_MOST_SEEDS:,} are possible")
        self._given = base.model_dump(mode="json", exclude_unset=True, exclude={"run_dir"})
        self.space, self.n_trials = space, n_points(space, trials)
        self._base = base = ready(base)
        self.folder = Path(base.run_dir or f"runs/{base.name}-sweep")
        self.seeds = [base.seed + index for index in range(seeds)]
        self.exit_code: int | None = None
        self._busy = set[tuple[int, int]]()
        self._keep_last = None if base.is_set("train.keep_last") else 1
        if not settle(base).val_tokens:
            raise DataError("a sweep compares validation losses; this data has no validation text")
        atomic.make_folder(self.folder)
        with self._alone():
            try:
                self._study = self._open_journal()
            except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
                hint = "move it away; the same command then makes it again and keeps the runs"
                raise DataError(f"{self.folder / JOURNAL}: damaged ({error})", hint) from error
            self._require_same()

    def next(self) -> tuple[Trial, int] | None:
        """Return a trial and the seed to train it with; None if nothing is left to this process."""
        with self._alone():
            while True:
                trials = self._trials()
                for one in trials:
                    for seed, value in one.losses.items():
                        is_open = value is None and one.error is None
                        if is_open and (one.number, seed) not in self._busy:
                            return one, seed
                    known = [value for value in one.losses.values() if value is not None]
                    if len(known) == len(self.seeds):
                        self._study.tell(one.number, sum(known) / len(known), skip_if_finished=True)
                if len(trials) >= self.n_trials:
                    return None
                self._add(len(trials))

    def train(self, one: Trial, seed: int, on_event: OnEvent = lambda event: None) -> str:
        """Train a trial with a seed until it ends or a signal stops it; return what came of it.

        An error that is not about its settings, such as a full disk, is raised.
        """
        try:
            run = train(self._config(one, seed), resume=True)
            with contextlib.closing(run), run.on_signals():
                for event in run:
                    on_event(event)
        except RunLockedError:
            self._busy.add((one.number, seed))
            return "another process trains it"
        except NonFiniteError as error:
            return error.message
        except (GptError, MemoryError, RuntimeError) as error:
            if not isinstance(error, ConfigError) and not is_out_of_memory(error):
                raise
            self._busy.add((one.number, seed))  # a trial that has ended is not marked as failed
            self._fail(one, str(error))
            return f"failed: {error}"
        self.exit_code = run.exit_code
        assert run.summary is not None
        if self.exit_code is not None:
            return f"stopped at step {run.summary.step:,}, saved"
        return f"val loss {loss(run.summary.val_loss)}"

    def results(self) -> list[Trial]:
        """Return the trials, the best first; write the best as YAML, and a picture."""
        with self._alone():
            ranked = rank(self._trials())
            done = [one for one in ranked if one.mean is not None]
            if done:
                best = self._config(done[0]).model_dump(mode="json", exclude_unset=True)
                head = f"# Trial {done[0].number} of {self.folder}, {loss(done[0].mean)} val loss\n"
                atomic.write_bytes(self.folder / BEST, (head + dump_yaml(best)).encode())
            if done and importlib.util.find_spec("matplotlib") is not None:
                losses = [(one.settings, [v or 0.0 for v in one.losses.values()]) for one in done]
                scales = {swept.key: swept.is_log for swept in self.space}
                draw_sweep(scales, losses, self.folder / PICTURE)
        return ranked

    def run_folder(self, number: int, seed: int) -> Path:
        """Return the folder of a run."""
        return self.folder / f"{number:03d}-seed-{seed}"

    def _config(self, one: Trial, seed: int | None = None) -> Config:
        """Return the base with the settings of a trial, and its run's folder if there is a seed."""
        more: dict[str, Any] = {"name": f"{self.folder.name}-best"}
        if seed is not None:
            folder = self.run_folder(one.number, seed)
            more = {"name": f"{self.folder.name}-{folder.name}", "run_dir": str(folder)}
            more |= {"seed": seed, "train.keep_last": self._keep_last}
        settings = [f"{key}={flow(value)}" for key, value in one.settings.items()]
        return load_config(None, settings, more, base=self._given)

    def _trials(self) -> list[Trial]:
        """Return the trials of the journal, and how far their runs are."""
        return [
            Trial(one.number, one.params, {n: self._loss(one.number, n) for n in self.seeds},
                  one.user_attrs.get("error"))
            for one in self._study.get_trials(deepcopy=False)
        ]  # fmt: skip

    def _loss(self, number: int, seed: int) -> float | None:
        status = Run(self.run_folder(number, seed)).read_status()
        if status.get("exit_code") == NonFiniteError.exit_code:
            return math.inf
        summary = summary_of(status) if status.get("state") == "finished" else None
        return None if summary is None else summary.val_loss

    def _add(self, number: int) -> None:
        """Add a trial to the journal, with all its settings at once."""
        from optuna.trial import TrialState, create_trial

        kinds = {one.key: _distribution(one) for one in self.space}
        settings = point(self.space, self._base.seed, number)
        self._study.add_trial(
            create_trial(state=TrialState.RUNNING, params=settings, distributions=kinds)
        )

    def _fail(self, one: Trial, reason: str) -> None:
        from optuna import trial

        with self._alone():
            found = self._study.trials[one.number]
            if not found.state.is_finished():
                trial.Trial(self._study, found._trial_id).set_user_attr("error", reason)
                self._study.tell(one.number, state=trial.TrialState.FAIL)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the journal for a moment, once other processes have let go of it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(atomic.storage_errors(self.folder / JOURNAL))
            while True:
                with contextlib.suppress(RunLockedError):
                    stack.enter_context(locking.hold(self.folder, "writes to this sweep", "wait"))
                    break
                time.sleep(0.05)
            yield

    def _open_journal(self) -> "Study":
        import optuna
        from optuna.storages.journal import JournalFileBackend

        path = self.folder / JOURNAL
        if path.exists():  # its last line may be one that a crash cut short
            whole, end, rest = path.read_bytes().rpartition(b"\n")
            if rest:
                atomic.write_bytes(path, whole + end)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        held: Any = SimpleNamespace(acquire=lambda: True, release=lambda: None)  # by `_alone`
        backend = JournalFileBackend(str(path), held)
        storage = optuna.storages.JournalStorage(backend)
        return optuna.create_study(storage=storage, study_name="gptcli", load_if_exists=True)

    def _require_same(self) -> None:
        """Record what the sweep is; refuse to continue one that began as another."""
        base = self._base.model_dump(mode="json") | {"name": None, "run_dir": None}
        facts = flatten(base) | {f"{one.key}=": one.text for one in self.space}
        facts |= {"--seeds": len(self.seeds)}
        begun = self._study.user_attrs.get("gptcli")
        if begun is None:
            self._study.set_user_attr("gptcli", begun := facts)
        old = flatten(Config().model_dump(mode="json")) | begun  # which lacks keys that are newer
        old.pop("--adaptive", None)  # an option of sweeps that began before
        changed = [f"{key} ({old.get(key)} there, {facts.get(key)} here)"
                   for key in old | facts if old.get(key) != facts.get(key)]  # fmt: skip
        if changed:
            raise ConfigError(
                f"{self.folder}: holds another sweep; changed: {', '.join(changed)}",
                "undo the change to continue it, or begin another with -s name=...",
            )


def _distribution(one: Swept) -> "BaseDistribution":
    from optuna import distributions

    if one.choices:
        return distributions.CategoricalDistribution(one.choices)
    if one.is_whole:
        return distributions.IntDistribution(int(one.low), int(one.high), log=one.is_log)
    return distributions.FloatDistribution(one.low, one.high, log=one.is_log)
