"""Where runs are computed: on the cores of this machine, or on a Dask or Ray cluster, through one call of joblib."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

BackendName = Literal["loky", "dask", "ray"]
BACKENDS: tuple[BackendName, ...] = ("loky", "dask", "ray")


MOST_JOBS = 4096


@dataclass(frozen=True, slots=True)
class Backend:
    """How to compute: `jobs` processes (-1: one per core; dask and ray use the whole cluster), `address` of a cluster.

    Without an address, dask and ray start a cluster on this machine.
    """

    name: BackendName = "loky"
    jobs: int = -1
    address: str = ""

    def check(self) -> None:
        """Raises ValueError if this cannot be meant."""
        if self.jobs == 0 or not -1 <= self.jobs <= MOST_JOBS:
            wanted = f"give 1 to {MOST_JOBS} processes, or -1 for one per core"
            raise ValueError(f"-j {self.jobs} is not possible; {wanted}")
        if self.address and self.name == "loky":
            raise ValueError(f"--scheduler {self.address} needs --backend dask or ray")


LOCAL = Backend()


def run_all(function: Callable[[Any], Any], items: Sequence[Any], backend: Backend) -> Generator[Any, None, None]:
    """The function's results in the order in which they are ready."""
    import joblib

    # Ray's joblib backend has one worker unless all are asked for, and gives results only when all are there.
    settings: dict[str, Any] = {"n_jobs": -1}
    if backend.name == "loky":
        # Workers outlive a parent that is killed; they should not do so for minutes.
        settings = {"n_jobs": backend.jobs, "idle_worker_timeout": 10}
    with _CONNECT[backend.name](backend), joblib.parallel_config(backend=backend.name, **settings):
        if backend.name == "ray":
            for chunk in _chunks(items, 4 * joblib.effective_n_jobs()):
                yield from joblib.Parallel()(joblib.delayed(function)(item) for item in chunk)
        else:
            parallel = joblib.Parallel(return_as="generator_unordered")
            try:
                yield from parallel(joblib.delayed(function)(item) for item in items)
            except BrokenProcessPool:
                reason = "a worker process was killed, most often because memory ran out"
                raise OSError(f"{reason}; finished runs are kept: go on with fewer at once, -j 1") from None


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def probe() -> str:
    """Runs on a cluster before any work is sent, as one that cannot import this package would wait for ever."""
    from weft.store import code_hash

    return code_hash()


def _check_code(where: str, hashes: Iterable[str]) -> None:
    if set(hashes) != {probe()}:
        raise ValueError(f"{where} have another version of weft than this machine; install the same one there")


@contextmanager
def _loky(backend: Backend) -> Iterator[None]:
    yield


@contextmanager
def _dask(backend: Backend) -> Iterator[None]:
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--backend dask needs Dask: pip install 'weft[dask]'") from None
    try:
        client = Client(backend.address or None, timeout=10)
    except (OSError, ValueError) as error:
        raise ValueError(f"no Dask scheduler answers at {backend.address!r} ({error})") from None
    with client:
        where = f"the Dask scheduler and workers at {client.scheduler.address}"
        try:
            hashes = {client.run_on_scheduler(probe), *client.run(probe).values()}
        except Exception as error:
            raise ValueError(f"{where} cannot import weft ({error}); install it there") from None
        _check_code(where, hashes)
        yield


@contextmanager
def _ray(backend: Backend) -> Iterator[None]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError:
        raise ValueError("--backend ray needs Ray: pip install 'weft[ray]'") from None
    host, colon, port = backend.address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        # Ray itself would try for minutes.
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ValueError(f"no Ray cluster answers at {backend.address!r} ({error})") from None
    try:
        ray.init(address=backend.address or None, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"no Ray cluster answers at {backend.address!r} ({error})") from None
    try:
        try:
            code = ray.get(ray.remote(probe).remote())
        except Exception as error:
            raise ValueError(f"the Ray workers cannot import weft ({type(error).__name__}); install it there") from None
        _check_code("the Ray workers", [code])
        register_ray()
        yield
    finally:
        ray.shutdown()


_CONNECT: dict[BackendName, Callable[[Backend], AbstractContextManager[None]]] = {
    "loky": _loky,
    "dask": _dask,
    "ray": _ray,
}
