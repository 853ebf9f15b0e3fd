"""
Variables by which other programs configure Celery, and which ganq's Celery must not read.

Celery prefers some of them to what its application says: with CELERY_BROKER_URL or BROKER_URL
of another project in the environment, a worker would listen to that project's broker.
"""

from collections.abc import Mapping, MutableMapping

PREFIXES = ("CELERY", "KOMBU_")
NAMES = frozenset(
    {
        # Options of the command `celery`, as click reads them.
        *("APP", "BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE", "SKIP_CHECKS"),
        # Celery, kombu and billiard.
        *("AUTOSCALE_KEEPALIVE", "C_BENCH", "C_BENCH_EVERY", "C_FAKEFORK", "C_FORCE_ROOT", "C_IMPDEBUG"),
        *("C_REMDEBUG", "C_STRICT_APP", "C_WARN_APP", "C_WNOCONF", "DISABLE_TRACEBACKS", "EVENTLET_NOBLOCK"),
        *("FORKED_BY_MULTIPROCESSING", "MP_LOG", "MP_MAIN_FILE", "MULTIPROCESSING_FORKING_DISABLE"),
        *("NOSETPS", "PICKLE_PROTOCOL", "REMAP_SIGTERM", "TIMER_DEBUG", "USE_FAST_LOCALS"),
        *("_MP_FORK_LOGFILE_", "_MP_FORK_LOGFORMAT_", "_MP_FORK_LOGLEVEL_"),
        # Django's, which Celery would load.
        *("DJANGO_PROJECT_DIR", "DJANGO_SETTINGS_MODULE"),
    }
)


def foreign(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that Celery would read and ganq ignores."""
    return sorted(name for name in environment if name in NAMES or name.startswith(PREFIXES))


def clear(environment: MutableMapping[str, str]) -> None:
    """Take them away; called before Celery is imported, as it reads some of them only then."""
    for name in foreign(environment):
        del environment[name]
