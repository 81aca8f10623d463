"""Jobs on a Ray cluster of two nodes, one of which is killed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs_that_end import end_somehow, write_slowly

from itemizedclip.runtime.ray_jobs import run_jobs_on_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(540)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that has no core for jobs, and two nodes of one core each; this process is connected to it."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "240")  # on a busy machine
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    helpers = str(Path(__file__).parents[1] / "helpers")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    # Connected while there is the head alone: the node that is killed must not be the one that this process hangs on.
    ray.init(address=made.address, runtime_env={"env_vars": {"PYTHONPATH": helpers}}, log_to_driver=False)
    made.cores = [made.add_node(num_cpus=1), made.add_node(num_cpus=1)]
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_node_that_dies_takes_no_job_with_it(cluster, tmp_path):
    jobs = [(number, str(tmp_path)) for number in range(8)]

    def kill() -> None:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        cluster.remove_node(cluster.cores[1], allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    ends = {end.job: end.failure for end in run_jobs_on_ray(write_slowly, jobs, time_limit_s=120)}
    killer.join()
    assert ends == dict.fromkeys(range(8), "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(8)))


def test_a_bad_job_takes_nothing_else_down(cluster, tmp_path):
    jobs = [(number, str(tmp_path)) for number in (0, 1, 3)]
    ends = {end.job: end.failure for end in run_jobs_on_ray(end_somehow, jobs, time_limit_s=120)}
    assert ends == {
        0: "",
        1: "its process was ended by SIGKILL (mostly: memory used up)",
        2: "its process ended with status 7",
    }
