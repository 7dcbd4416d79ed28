"""The deployment files: valid where they are sent, with settings that `flashu run` knows, and no credentials in them.

The launcher's YAML is checked by Ray's own schema. KubeRay's CRD is in no package, so the RayJob is held against the
field names of its v1 API, written down below. Slurm's script runs here, with stand-ins for Slurm's and Ray's commands.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray import __version__ as ray_version

from jobs.settings.config import read_config

DEPLOY = Path(__file__).parents[2] / "cluster" / "deploy"

# KubeRay's v1 API (ray-operator/apis/ray/v1), and the parts of Kubernetes' that are used.
FIELDS = {
    "RayJob": "apiVersion kind metadata spec",
    "RayJobSpec": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector "
    "submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources "
    "entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend",
    "RayClusterSpec": "headGroupSpec workerGroupSpecs rayVersion enableInTreeAutoscaling autoscalerOptions "
    "headServiceAnnotations suspend managedBy gcsFaultToleranceOptions authOptions",
    "AuthOptions": "mode enableK8sTokenAuth secretName",
    "AutoscalerOptions": "resources image imagePullPolicy env envFrom volumeMounts securityContext idleTimeoutSeconds "
    "upscalingMode version",
    "HeadGroupSpec": "serviceType headService enableIngress rayStartParams template",
    "WorkerGroupSpec": "groupName replicas minReplicas maxReplicas numOfHosts rayStartParams template scaleStrategy "
    "suspend idleTimeoutSeconds",
    "PodSpec": "containers initContainers volumes tolerations nodeSelector affinity serviceAccountName "
    "terminationGracePeriodSeconds restartPolicy securityContext imagePullSecrets",
    "Container": "name image imagePullPolicy command args env envFrom ports resources volumeMounts lifecycle",
}


@pytest.fixture(scope="module")
def launcher():
    return yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())


@pytest.fixture(scope="module")
def rayjob_documents():
    return list(yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text()))


def unknown(kind, given):
    return set(given) - set(FIELDS[kind].split())


def test_the_launcher_file_passes_rays_own_check(launcher):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher))


def test_launcher_workers_are_spot_gpus_and_the_head_stays_and_takes_no_work(launcher):
    worker, head = launcher["available_node_types"]["gpu-worker"], launcher["available_node_types"]["head"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["max_workers"] <= launcher["max_workers"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}


def test_the_rayjob_has_only_fields_that_kuberay_knows(rayjob_documents):
    job = rayjob_documents[1]
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert not unknown("RayJob", job)
    assert not unknown("RayJobSpec", job["spec"])
    assert not unknown("RayClusterSpec", cluster)
    assert not unknown("AutoscalerOptions", cluster["autoscalerOptions"])
    assert not unknown("AuthOptions", cluster["authOptions"])
    groups = [("HeadGroupSpec", cluster["headGroupSpec"])]
    groups += [("WorkerGroupSpec", group) for group in cluster["workerGroupSpecs"]]
    for kind, group in groups:
        assert not unknown(kind, group)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert not unknown("PodSpec", pod)
        for container in pod["containers"]:
            assert not unknown("Container", container)
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_rayjob_workers_hold_a_gpu_each_and_every_pod_the_secret(rayjob_documents):
    cluster = rayjob_documents[1]["spec"]["rayClusterSpec"]
    (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    for container in (head, worker):
        assert container["envFrom"][0]["secretRef"]["name"] == "flashu-s3"


def test_the_rayjobs_config_is_one_that_flashu_reads(rayjob_documents, tmp_path):
    config_map, job = rayjob_documents
    (name, text), *_ = config_map["data"].items()
    mount = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]
    assert job["spec"]["entrypoint"] == f"flashu run {mount['mountPath']}/{name}"

    (tmp_path / name).write_text(text)
    config = read_config(str(tmp_path / name))
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert config.cluster.workers == group["maxReplicas"]
    assert config.cluster.gpus_per_worker == 1


def test_every_way_to_start_ray_asks_for_a_token(rayjob_documents, launcher):
    """What they do for it is run in tests/jobs/driver/test_ray_tokens.py, as far as it can be here."""
    assert rayjob_documents[1]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert any("RAY_AUTH_MODE=token" in option for option in launcher["docker"]["run_options"])
    assert launcher["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}" in (DEPLOY / "slurm.sh").read_text()


def test_every_setting_that_the_files_override_exists():
    text = "".join(path.read_text() for path in DEPLOY.iterdir())
    overrides = set(re.findall(r"\b(?:cluster|output|storage|model)\.\w+(?==)", text))
    assert {"cluster.workers", "cluster.gpus_per_worker", "cluster.address"} <= overrides
    read_config(None, [f"{key}=1" for key in sorted(overrides)])


def test_rays_version_is_the_same_everywhere(rayjob_documents):
    assert rayjob_documents[1]["spec"]["rayClusterSpec"]["rayVersion"] == ray_version
    assert f"rayproject/ray:{ray_version}-" in (DEPLOY / "Dockerfile").read_text()


def test_no_file_holds_a_credential():
    for path in DEPLOY.iterdir():
        text = path.read_text()
        assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", text), path
        for value in re.findall(r"(?:SECRET_ACCESS_KEY|SESSION_TOKEN|ACCESS_KEY_ID)\s*[=:]\s*(\S+)", text):
            assert value.strip('"').startswith(("$", "…")), (path, value)


# Slurm


HELPERS = """
log() { echo "$*" >> "$LOG"; }
log_mode() { log mode "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}"; }
"""
COMMANDS = {
    "scontrol": 'log scontrol "$@"; if [ "$1" = show ]; then printf "node1\\nnode2\\nnode3\\n"; fi',
    "srun": 'log_mode; log srun "$@"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": 'echo "10.0.0.7 172.17.0.1 "',
    "ray": 'log ray "$@"; if [ "$1" = status ]; then [ ! -e "$DOWN" ]; else [ ! -e "$DOWN" ] && exec sleep 60; fi',
    "flashu": f'log_mode; log flashu "$@"; exec {sys.executable} -c "$FLASHU"',
}
# In Python, as `flashu` is: Bash cannot catch the SIGINT that it was started to ignore.
FLASHU = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: sys.exit(128 + number))
open(os.environ["READY"], "w").close()
while not os.path.exists(os.environ["DONE"]):
    time.sleep(0.02)
"""


class Slurm:
    """A folder of stand-ins for Slurm's and Ray's commands, which write down how they were called."""

    def __init__(self, folder):
        self.log, self.done, self.down, self.ready = (folder / name for name in ("log", "done", "down", "ready"))
        self.log.touch()
        commands = folder / "bin"
        commands.mkdir()
        for name, body in COMMANDS.items():
            (commands / name).write_text(f"#!/bin/bash\n{HELPERS}\n{body}\n")
            (commands / name).chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")},
            "PATH": f"{commands}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "DONE": str(self.done),
            "DOWN": str(self.down),
            "READY": str(self.ready),
            "FLASHU": FLASHU,
            "SLURM_JOB_ID": "31234",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "32",
        }

    def start(self, *arguments):
        script = [shutil.which("bash"), str(DEPLOY / "slurm.sh"), *arguments]
        return subprocess.Popen(
            script, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def calls(self, start=""):
        return [line for line in self.log.read_text().splitlines() if line.startswith(start)]

    def wait_until_the_run_is_going(self):
        for _ in range(400):
            if self.ready.exists() and len(self.calls("srun")) == 3:
                return
            time.sleep(0.025)
        raise AssertionError(f"no run after {self.calls()}")


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def test_slurm_starts_ray_on_every_node_and_the_run_on_all_their_gpus(slurm):
    script = slurm.start("config.yaml", "sampling.seed=1")
    slurm.wait_until_the_run_is_going()
    slurm.done.touch()
    output, _ = script.communicate(timeout=20)
    assert script.returncode == 0, output
    address = "10.0.0.7:21234"
    starts = sorted(slurm.calls("srun"), key=lambda line: line.split("--nodelist=")[1])
    assert [re.search(r"--nodelist=(\S+) ray start (--head|--address=\S+)", line).groups() for line in starts] == [
        ("node1", "--head"),
        ("node2", f"--address={address}"),
        ("node3", f"--address={address}"),
    ]
    assert all("--cpus-per-task=32" in line and "--num-gpus=4" in line and "--block" in line for line in starts)
    assert "--port=21234" in starts[0]
    assert slurm.calls("flashu") == [
        f"flashu run config.yaml cluster.address={address} cluster.gpus_per_worker=1 cluster.workers=12 sampling.seed=1"
    ]
    assert slurm.calls("mode") == ["mode token 64"] * 4
    assert not slurm.calls("scontrol requeue")


def test_slurms_script_makes_no_token_where_none_is_wanted(slurm):
    slurm.environment["RAY_AUTH_MODE"] = "disabled"
    script = slurm.start("config.yaml")
    slurm.wait_until_the_run_is_going()
    slurm.done.touch()
    output, _ = script.communicate(timeout=20)
    assert script.returncode == 0, output
    assert slurm.calls("mode") == ["mode disabled 0"] * 4


def test_slurms_time_limit_stops_the_run_softly_and_requeues_it(slurm):
    script = slurm.start("config.yaml")
    slurm.wait_until_the_run_is_going()
    script.send_signal(signal.SIGUSR1)
    output, _ = script.communicate(timeout=20)
    assert script.returncode == 128 + signal.SIGINT, output
    assert slurm.calls("scontrol requeue") == ["scontrol requeue 31234"]


def test_scancel_and_preemption_stop_the_run_at_once(slurm):
    script = slurm.start("config.yaml")
    slurm.wait_until_the_run_is_going()
    script.send_signal(signal.SIGTERM)
    output, _ = script.communicate(timeout=20)
    assert script.returncode == 128 + signal.SIGTERM, output
    assert not slurm.calls("scontrol requeue")


def test_slurm_says_when_ray_does_not_start(slurm):
    slurm.down.touch()
    script = slurm.start("config.yaml")
    output, _ = script.communicate(timeout=20)
    assert script.returncode == 1
    assert "Ray did not start on node1 at 10.0.0.7:21234" in output
    assert not slurm.calls("flashu")


def test_slurm_wants_a_config(slurm):
    script = slurm.start()
    output, _ = script.communicate(timeout=20)
    assert script.returncode == 2
    assert "name a config" in output
    assert not slurm.calls()
