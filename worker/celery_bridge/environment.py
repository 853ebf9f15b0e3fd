"""
Environment variables that configure Celery for other programs, and that ganq's Celery must not read.

Some of them take precedence over the application's configuration: with CELERY_BROKER_URL or BROKER_URL of
another project in the environment, a worker would connect to that project's broker.
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
    """Delete these variables. To be called before Celery is imported, because it reads some on import."""
    for name in foreign(environment):
        del environment[name]
