"""The Optuna study behind a sweep or a search: what was tried, kept in a file or in a team's database."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tsugiki.artifacts import digest
from tsugiki.errors import UserError

STORAGE_VARIABLE = "TSUGIKI_STORAGE"
HEARTBEAT = 30  # seconds between two signs of life of a running trial
MISSED = 3  # signs of life that may fail to come before a trial is given to another worker
RETRIES = 2  # of a trial whose worker died: it may be the trial that kills its workers
OPENED_AGAIN = 5  # two machines that make the tables of an empty database at once: one fails, and finds them there


def open_study(name: str, folder: Path, storage: str | None = None):
    """The Optuna study (lowest value is best) of one folder; trials that a kill left running are failed.

    It is kept in ``folder/study.sqlite3``, or in the database of ``storage`` or ``$TSUGIKI_STORAGE``. There its name has the
    names of domain and base before it and a mark of this machine and folder behind it: another machine's sweep over the
    same domain and base is a study of its own, whose running trials are left alone.

    Args:
        name: of the study.
        folder: ``<domain>/<base>/<stage>``, which one process at a time works in; made when it is not there.
        storage: URL of a database.

    Raises:
        UserError: a database that cannot be used.
    """
    from optuna.trial import TrialState

    storage = storage or os.environ.get(STORAGE_VARIABLE) or None
    if storage:
        here = folder.resolve()
        name = f"{here.parent.parent.name}/{here.parent.name}/{name}-{digest([platform.node(), str(here)])[:8]}"
    study = join_study(name, folder, storage)
    with refusals(storage):
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
    return study


def join_study(name: str, folder: Path, storage: str | None = None, *, heartbeat: int = HEARTBEAT, sampler=None, pruner=None):
    """An Optuna study (lowest value is best) that several processes or machines may work on; made when it is not there.

    Args:
        name: of the study, the same for all who work on it.
        folder: of ``study.sqlite3``, where no storage is given; made when it is not there.
        storage: URL of a database, which all reach.
        heartbeat: seconds between two signs of life of a running trial (:func:`beating`).
        sampler, pruner: Optuna's.

    Raises:
        UserError: a database that cannot be used; its password is in no message.
    """
    import optuna
    from sqlalchemy.exc import NoSuchModuleError

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")  # our own beating() does what Study.optimize would
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not storage:
        folder.mkdir(parents=True, exist_ok=True)
    url = _driver_url(storage) if storage else f"sqlite:///{(folder / 'study.sqlite3').resolve()}"
    with refusals(storage):
        try:
            kept = _connect(url, heartbeat)
        except (ImportError, NoSuchModuleError) as error:
            raise UserError(f"there is no driver for the database {shown_storage(storage)}: {_reason(error, storage)}",
                            hint="PostgreSQL: pip install 'tsugiki[team]'") from None
        except RuntimeError as error:  # a schema of another version of Optuna
            raise UserError(f"the database {shown_storage(storage)} cannot be used: {_reason(error, storage)}") from None
        return optuna.create_study(
            study_name=name, storage=kept, direction="minimize", load_if_exists=True, sampler=sampler, pruner=pruner
        )


def _connect(url: str, heartbeat: int):
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    patience = {"timeout": 60} if url.startswith("sqlite") else {"connect_timeout": 10} if url.startswith("postgresql") else {}
    for attempt in range(OPENED_AGAIN):
        try:
            return RDBStorage(
                url, {"connect_args": patience, "pool_pre_ping": True}, heartbeat_interval=heartbeat, grace_period=MISSED * heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            if attempt == OPENED_AGAIN - 1 or "exists" not in str(error):
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError


def put_back(study, trial) -> bool:
    """Fail a running trial and queue its settings again; ``False`` where another process has ended it meanwhile."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from optuna.trial import TrialState

    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):
        return False
    RetryHeartbeatStaleTrialCallback()(study, trial)
    return True


@contextlib.contextmanager
def beating(study, trial, seconds: float) -> Iterator[None]:
    """Give signs of life of a running trial while the block runs, so that it is known for dead when its worker is."""
    storage, number = study._storage, trial._trial_id
    ended = threading.Event()
    storage.record_heartbeat(number)

    def beat() -> None:
        while not ended.wait(seconds):
            with contextlib.suppress(Exception):  # the database is away for a moment: the trial's own report will tell
                storage.record_heartbeat(number)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# --- points of a sweep ----------------------------------------------------------------------------------------


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


# --- databases ------------------------------------------------------------------------------------------------


def shown_storage(storage: str | None) -> str:
    """A database's URL to show to people: without its password and without the options behind the question mark."""
    if not storage:
        return "study.sqlite3"
    url = _parsed(storage)
    user = f"{url.username}@" if url.username else ""
    host = f"{url.host or ''}{f':{url.port}' if url.port else ''}"
    return f"{url.get_backend_name()}://{user}{host}/{url.database or ''}"


@contextlib.contextmanager
def refusals(storage: str | None) -> Iterator[None]:
    """Make a database's errors within the block the user's: which database, and why; never its password.

    Raises:
        UserError: in place of SQLAlchemy's and Optuna's errors.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        hint = "Check that the server runs, and its address, user and password."
        if not storage or storage.startswith("sqlite"):
            hint = "Check that its folder is there and can be written; a file that is no database is to be removed."
        raise UserError(f"the database {shown_storage(storage)} cannot be used: {_reason(error, storage)}", hint=hint) from None


def _driver_url(storage: str) -> str:
    """The URL for SQLAlchemy; PostgreSQL through psycopg 3, whatever SQLAlchemy's default is."""
    _parsed(storage)
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", storage)


def _parsed(storage: str):
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(storage)
        if "@" in (url.host or ""):  # the end of a password with such a sign, taken for the host
            raise ValueError
        return url
    except (ArgumentError, ValueError):  # whose message may hold a part of the password
        raise UserError("the storage is not a database's URL", hint="For example sqlite:///study.sqlite3 or postgresql://user@host/name; "
                        "signs other than letters and digits in a password as %XX.") from None


def _reason(error: BaseException, storage: str | None) -> str:
    """The first line of the innermost error, the password taken out."""
    while inner := getattr(error, "orig", None) or error.__cause__:
        error = inner
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if storage:
        url = _parsed(storage)
        for secret in filter(None, (url.password, url.query.get("password"))):
            said = said.replace(str(secret), "***")
    return said
