"""The jobs of `itemizedclip.runtime.jobs` on the nodes of a Ray cluster, for clusters without Slurm.

Every job still runs in a process of its own, with its time limit, started by a Ray task of one core. What a node that
dies had at hand is given to another one. All nodes must see the same files and have the same packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.jobs import JobEnd, run_jobs
from itemizedclip.runtime.registry import MissingExtraError

_AHEAD = 2
"""Jobs handed out per core of the cluster, so that no core waits; 200,000 at once would fill its memory."""


def run_jobs_on_ray(
    function: Callable[..., None],
    jobs: Sequence[tuple[Any, ...]],
    *,
    time_limit_s: float = 0.0,
    preload: Sequence[str] = (),
    address: str | None = None,
) -> Iterator[JobEnd]:
    """As `run_jobs`, as many at once as the cluster has cores.

    Args:
        function, jobs, time_limit_s, preload: see there.
        address: of the cluster, such as "auto" or "10.0.0.1:6379"; None: RAY_ADDRESS, else a cluster of this machine.

    Raises:
        MissingExtraError: Ray is not installed.
        UserError: no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--engine ray needs the package ray: pip install -e '.[ray]'") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0][:160]
            raise UserError(
                f"no Ray cluster at {address or 'RAY_ADDRESS'} ({reason}); start one by `ray start --head`, or leave "
                "--ray-address out for this machine alone"
            ) from None
    # A task whose node died is done again elsewhere, as often as needed.
    remote = ray.remote(num_cpus=1, max_retries=-1)(_one_job)
    try:
        running: dict[Any, int] = {}
        waiting = iter(range(len(jobs)))
        while True:
            room = max(1, int(ray.cluster_resources().get("CPU", 1))) * _AHEAD
            while len(running) < room and (number := next(waiting, None)) is not None:
                running[remote.remote(function, jobs[number], time_limit_s, tuple(preload))] = number
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                yield replace(ray.get(reference), job=running.pop(reference))
    finally:
        if started:
            ray.shutdown()


def _one_job(
    function: Callable[..., None], job: tuple[Any, ...], time_limit_s: float, preload: tuple[str, ...]
) -> JobEnd:
    (end,) = run_jobs(function, [job], workers=1, time_limit_s=time_limit_s, preload=preload)
    return end
