"""The Optuna study behind a sweep or a search: what was tried, kept in a file or in a team's database."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def open_study(name: str, folder: Path):
    """An Optuna study (lowest value is best) in ``folder/study.sqlite3``; trials that a kill left running are failed.

    Args:
        name: of the study.
        folder: where its file lies; made when it is not there.
    """
    import optuna
    from optuna.trial import TrialState

    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=name, storage=f"sqlite:///{(folder / 'study.sqlite3').resolve()}", direction="minimize", load_if_exists=True
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def ask_point(study, n: int, seed: int, key: str):
    """A running trial for one point of a sweep."""
    study.enqueue_trial({"n": n, "seed": seed}, user_attrs={"key": key})
    return study.ask(_distributions())


def record_untold(study, values: Mapping[tuple[int, int], float], key: str) -> None:
    """Complete trials of the points that were finished when a kill came before the study heard of it.

    Args:
        study: of the sweep.
        values: test NLL of each ``(n, seed)``, nats/token.
        key: of the sweep's settings, data and base.
    """
    from optuna.trial import TrialState, create_trial

    told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    known = {(t.params["n"], t.params["seed"]) for t in told if t.user_attrs.get("key") == key}
    for (n, seed), nll in values.items():
        if (n, seed) not in known:
            study.add_trial(
                create_trial(params={"n": n, "seed": seed}, distributions=_distributions(), value=nll, user_attrs={"key": key})
            )


def _distributions() -> dict[str, Any]:
    from optuna.distributions import IntDistribution

    return {"n": IntDistribution(1, 100_000_000), "seed": IntDistribution(0, 2**31 - 1)}
