"""scripts/launch.sh and the Slurm files: how many processes, which addresses, and what a signal reaches.

scontrol, srun and nvidia-smi are stand-ins on PATH; torchrun is the real one where ranks matter.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OWN = ("GPUS", "PYTHON", "LOGS", "RESUME", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")

SRUN = """#!{python}
# One process per node, as srun starts them; signals are passed on to all.
import os, signal, subprocess, sys
command = [argument for argument in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(node)}}) for node in nodes]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""

SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$PLACE/scontrol.txt"
if [[ "$1" == show ]]; then echo "$FIRST_NODE"; sleep 0.1; seq -f node%g 2 20000; fi
"""

ECHO = """#!/usr/bin/env bash
printf '%s\\n' "$@"
"""

WORKER = """
import json, os, signal, sys, time
from pathlib import Path
place, names = Path(os.environ["PLACE"]), ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RESUME")
me = {name: os.environ.get(name) for name in names} | {"arguments": sys.argv[1:]}
got = []
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(number))
(place / f"started{me['RANK'] or 0}.json").write_text(json.dumps(me))
while not got and "--wait" in sys.argv:
    time.sleep(0.02)
(place / f"saved{me['RANK'] or 0}").touch()
sys.exit(75 if got else 0)
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path) -> Path:
    """A project folder with the real scripts, a train script of its own, and stand-ins in bin/."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    write_program(tmp_path / "bin" / "srun", SRUN.format(python=sys.executable))
    write_program(tmp_path / "bin" / "scontrol", SCONTROL)
    write_program(tmp_path / "bin" / "echo_arguments", ECHO)
    write_program(
        tmp_path / "train_toy.sh",
        'source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"\n'
        'launch "$ROOT/worker.py" ${RESUME:+--resume "$RESUME"} --logs "$LOGS" "$@"\n',
    )
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def environment(project: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in OWN and not name.startswith("SLURM")}
    path = f"{project / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return kept | {"PATH": path, "PLACE": str(project), "PYTHON": sys.executable} | variables


def slurm(project: Path, **variables: str) -> dict[str, str]:
    job = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": "45678", "SLURM_JOB_NODELIST": "node[7-8]",
           "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "FIRST_NODE": "127.0.0.1"}  # fmt: skip
    return environment(project, **job | variables)


def arguments(project: Path, *flags: str, **variables: str) -> list[str]:
    """What launch.sh gives to Python."""
    done = run_toy(project, *flags, PYTHON=str(project / "bin" / "echo_arguments"), **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def run_toy(project: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", str(project / "train_toy.sh"), *flags]
    env = environment(project, **variables)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd="/")


def wait_for(*paths: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() and (path.suffix != ".json" or path.read_text()) for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} after {seconds} s"
        time.sleep(0.02)


# --- launch.sh -------------------------------------------------------------------------------------------------------


SHELL_FILES = [*sorted(ROOT.glob("*.sh")), *sorted(ROOT.glob("scripts/*.sh")), *sorted(ROOT.glob("slurm/*"))]


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_one_process_without_a_gpu(project):
    assert arguments(project, "--name", "a b", CUDA_VISIBLE_DEVICES="") == [
        str(project / "worker.py"), "--logs", f"{project}/logs/", "--name", "a b",
    ]  # fmt: skip
    assert arguments(project, RESUME="latest", GPUS="1")[1:3] == ["--resume", "latest"]


@pytest.mark.parametrize(
    ("variables", "processes"),
    [({"CUDA_VISIBLE_DEVICES": "2,5,7"}, 3), ({"CUDA_VISIBLE_DEVICES": "0,1", "GPUS": "4"}, 4), ({}, 2)],
)
def test_torchrun_with_a_process_per_gpu(project, variables, processes):
    write_program(project / "bin" / "nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: one'\necho 'GPU 1: two'\n")
    found = arguments(project, **variables)
    assert found[:5] == ["-m", "itemizedclip.runtime.torchrun", "--standalone", "--nproc_per_node", str(processes)]
    # Without the "--" torchrun would read --logs as its own flag.
    assert found[5:7] == ["--", str(project / "worker.py")]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_do_not_count(project, hidden):
    write_program(project / "bin" / "nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: one'\necho 'GPU 1: two'\n")
    assert arguments(project, CUDA_VISIBLE_DEVICES=hidden)[0] == str(project / "worker.py")


def test_help_needs_no_processes(project):
    assert arguments(project, "--help", GPUS="8")[0] == str(project / "worker.py")


def test_several_nodes_meet_at_the_first(project):
    nodes = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "node7", "MASTER_PORT": "29444", "GPUS": "8"}
    assert arguments(project, **nodes)[:13] == [
        "-m", "itemizedclip.runtime.torchrun", "--nnodes", "3", "--node_rank", "2", "--nproc_per_node", "8",
        "--master_addr", "node7", "--master_port", "29444", "--",
    ]  # fmt: skip
    for name in ("NODE_RANK", "MASTER_ADDR"):
        done = run_toy(project, **{key: value for key, value in nodes.items() if key != name})
        assert done.returncode != 0
        assert f"{name}: set by slurm/train.sbatch" in done.stderr


def test_nodes_that_may_come_and_go_meet_at_a_store(project):
    nodes = {"NNODES": "3", "MASTER_ADDR": "node7", "MASTER_PORT": "29444", "GPUS": "8", "MAX_RESTARTS": "2"}
    expected = [
        "-m", "itemizedclip.runtime.torchrun", "--nnodes", "3:3", "--nproc_per_node", "8", "--max_restarts", "2",
        "--rdzv_backend", "c10d", "--rdzv_id", "itemizedclip", "--rdzv_endpoint", "node7:29444", "--",
    ]  # fmt: skip
    assert arguments(project, **nodes)[:15] == expected
    found = arguments(project, **nodes, MIN_NODES="2", RDZV_CONF="last_call_timeout=5")
    assert found[3] == "2:3"
    assert found[12:14] == ["--rdzv_conf", "last_call_timeout=5"]


def test_a_number_of_processes_that_is_none(project):
    done = run_toy(project, GPUS="two")
    assert done.returncode == 2
    assert done.stderr == "GPUS is 'two'; expected a number of processes\n"


def test_a_failing_process_leaves_its_message_last_but_one(project):
    """torchrun's own end is a trace of forty lines, under which the message is lost."""
    (project / "worker.py").write_text("import sys\nsys.stderr.write('worker: no such folder\\n')\nsys.exit(3)")
    done = run_toy(project, GPUS="2")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert "worker: no such folder" in lines
    assert re.fullmatch(r"the process of rank [01] ended with exit status 3; its message stands above", lines[-1])


# --- Slurm -----------------------------------------------------------------------------------------------------------


def start_job(project: Path, *flags: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), "train_toy.sh", *flags],
        env=slurm(project, **variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip


def test_two_nodes_form_one_group_and_save_before_the_time_limit(project):
    """Real torchrun, one agent per "node"; Slurm signals the batch shell alone."""
    job = start_job(project, "--wait", "--name", "run1")
    started = [project / "started0.json", project / "started1.json"]
    wait_for(*started)
    for rank, path in enumerate(started):
        worker = json.loads(path.read_text())
        assert (worker["RANK"], worker["WORLD_SIZE"], worker["LOCAL_RANK"]) == (str(rank), "2", "0")
        assert (worker["MASTER_ADDR"], worker["MASTER_PORT"]) == ("127.0.0.1", str(20000 + 45678 % 20000))
        assert worker["arguments"] == [
            "--resume", "latest", "--logs", f"{project}/logs/", "--wait", "--name", "run1",
        ]  # fmt: skip
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 75, errors
    assert "Traceback" not in errors
    assert (project / "saved0").exists()
    assert (project / "saved1").exists()
    assert (project / "scontrol.txt").read_text().splitlines() == ["show hostnames node[7-8]", "requeue 45678"]


def test_one_process_saves_too_and_a_cancelled_job_is_not_requeued(project):
    job = start_job(project, "--wait", SLURM_JOB_NUM_NODES="1")
    wait_for(project / "started0.json")
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 75, errors
    assert (project / "saved0").exists()
    assert "requeue" not in (project / "scontrol.txt").read_text()


def test_a_run_that_ends_by_itself_is_not_requeued_and_keeps_its_status(project):
    assert start_job(project, SLURM_JOB_NUM_NODES="1").wait(timeout=60) == 0
    (project / "worker.py").write_text("raise SystemExit(3)")
    assert start_job(project, SLURM_JOB_NUM_NODES="1").wait(timeout=60) == 3
    assert "requeue" not in (project / "scontrol.txt").read_text()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (137, True)])
def test_at_the_time_limit_only_what_was_stopped_or_killed_goes_back_into_the_queue(project, code, requeued):
    worker = WORKER.replace("sys.exit(75 if got else 0)", f"sys.exit({code})")
    (project / "worker.py").write_text(worker)
    job = start_job(project, "--wait", SLURM_JOB_NUM_NODES="1")
    wait_for(project / "started0.json")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == code
    assert ("requeue" in (project / "scontrol.txt").read_text()) == requeued


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_torchrun_passes_a_signal_on_once_and_waits(project, number):
    """torchrun itself would end with a trace, and kill its processes after thirty seconds."""
    command = ["bash", str(project / "train_toy.sh"), "--wait"]
    run = subprocess.Popen(command, env=environment(project, GPUS="2"), stderr=subprocess.PIPE, text=True, cwd="/")
    wait_for(project / "started0.json", project / "started1.json")
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 75
    assert "Traceback" not in errors
    assert "ended with" not in errors
    assert (project / "saved0").exists()
    assert (project / "saved1").exists()


def test_a_script_that_does_not_exist(project):
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), "train_nothing.sh"],
        env=slurm(project), capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"train_nothing.sh: no such script in {project}\n"
