"""Clusters that ask for a token, as `ray start` makes them: who has it gets in by every way, others are told in a line.

And clusters that are no more. Everything here is started as a user starts it, with a home of its own.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from cluster import authentication
from cluster.session import SessionError, check_address
from tests.command import assert_refused, flashu
from tests.jobs.driver.failing_work import NoModel

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
QUICK = ("flashu.preset=off", "sampling.num_inference_steps=2", "manifest.limit=1", "cluster.workers=1")
HOW = "in RAY_AUTH_TOKEN, in a file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def answers(address):
    with socket.socket() as opened:
        return opened.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0


class Started:
    """A cluster of `ray start`, without the processes of Ray's that nothing here uses."""

    def __init__(self, folder, **settings):
        self.address, self.dashboard = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))},
            "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "NO_PROXY": "*", "OMP_NUM_THREADS": "1",
            "HOME": str(folder), "RAY_TMPDIR": str(folder), **settings,
        }  # fmt: skip
        self.folder, self.client = folder, f"ray://127.0.0.1:{free_port()}"
        port, dashboard = self.address.rpartition(":")[2], self.dashboard.rpartition(":")[2]
        command = [BIN / "ray", "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}",
                   "--include-dashboard=true", f"--dashboard-port={dashboard}", "--include-log-monitor=false",
                   f"--ray-client-server-port={self.client.rpartition(':')[2]}", "--no-monitor", "--num-cpus=1",
                   f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]  # fmt: skip
        try:
            subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=120)
            self.wait_for(lambda: answers(self.dashboard) and answers(self.client))
            self.wait_for(self.takes_jobs)
        except BaseException:
            self.kill()
            raise

    def takes_jobs(self):
        """What `ray job list` asks, which takes seconds to start."""
        asked = urllib.request.Request(f"{self.dashboard}/api/jobs/")
        asked.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with suppress(OSError), opener.open(asked, timeout=30) as answer:
            return answer.status == 200
        return False

    def wait_for(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.5)

    def kill(self):
        """All its processes, which were started with this folder."""
        for file in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"RAY_TMPDIR={self.folder}".encode() in file.read_bytes().split(b"\0"):
                    os.kill(int(file.parent.name), signal.SIGKILL)


@pytest.fixture(scope="module")
def token():
    return secrets.token_hex(16)


@pytest.fixture(scope="module")
def cluster(token, tmp_path_factory):
    folder = Path(os.environ["RAY_TMPDIR"]) / "token"
    folder.mkdir()
    started = Started(folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    yield started
    started.kill()


@pytest.fixture
def user(monkeypatch, tmp_path):
    """Somebody with nothing set, and an empty home."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def holds(folder, text):
    return [file for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


@pytest.mark.parametrize("given", ["variable", "file", "home"])
def test_a_token_is_found_where_ray_would_find_it(cluster, token, user, tmp_path, given):
    if given == "variable":
        user.setenv("RAY_AUTH_TOKEN", token)
    else:
        file = tmp_path / ("named" if given == "file" else ".ray/auth_token")
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{token}\n")
    if given == "file":
        user.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    for address in (cluster.address, cluster.client):
        check_address(address)
    assert authentication.find_token().value == token


def test_a_run_joins_with_the_token_and_shows_it_nowhere(cluster, token, user, tmp_path):
    """One that goes on to its end is in the test of Slurm's script, and jobs that are submitted in test_submit.py."""
    user.setattr("jobs.driver.run.GenerationWork", NoModel)
    user.setenv("RAY_AUTH_TOKEN", token)
    before = dict(os.environ)
    run = tmp_path / "run"
    outcome = flashu("run", "demo", *QUICK, f"cluster.address={cluster.address}", f"output.path={run}")
    assert "Ray cluster of" in outcome.out
    assert "The run cannot go on: there is no model here" in outcome.out, "a worker said so"
    assert outcome.code == 1
    assert (run / "run.json").exists()
    assert token not in outcome.out + outcome.err
    assert holds(run, token) == []
    assert {name: os.environ.get(name) for name in before} == before
    assert os.environ.get("RAY_AUTH_MODE") is None


@pytest.mark.parametrize("command", ["run", "submit"])
def test_without_the_token_one_is_told_in_a_line(cluster, user, tmp_path, command):
    place = (f"cluster.address={cluster.address}",) if command == "run" else ("--address", cluster.dashboard)
    arguments = (command, "demo", *QUICK, f"output.path={tmp_path / 'run'}", *place)
    assert_refused(flashu(*arguments), "asks for a token, and none was found", HOW)
    with pytest.raises(SessionError, match="asks for a token, and none was found"):
        check_address(cluster.client)
    user.setenv("RAY_AUTH_TOKEN", "wrong-token")
    refused = flashu(*arguments)
    assert_refused(refused, "refuses the token from RAY_AUTH_TOKEN", HOW)
    assert "wrong-token" not in refused.err
    user.setenv("RAY_AUTH_TOKEN", "two\nlines")
    assert_refused(flashu(*arguments), "what is in RAY_AUTH_TOKEN is no token")
    user.delenv("RAY_AUTH_TOKEN")
    user.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    assert_refused(flashu(*arguments), f"RAY_AUTH_TOKEN_PATH {tmp_path / 'nowhere'} cannot be read: FileNotFoundError")


def test_no_token_stands_on_a_command_line(cluster, token):
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(file.read_bytes())
    assert [line for line in lines if str(cluster.folder).encode() in line]
    assert not [line for line in lines if token.encode() in line]


SLURM = {
    "scontrol": 'if [ "$1" = show ]; then tr , "\\n" <<< "$3"; fi',
    # Every node has a home of its own.
    "srun": 'echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> "$SAID"; export HOME=$(mktemp -d -p "$HOME"); '
    'while [[ $1 == --* ]]; do shift; done; exec "$@" >> "$STARTED"',
    "hostname": "echo 127.0.0.1",
    # Else the run may be over before the second node is there.
    "flashu": 'until [ "$(grep -c "Ray runtime started" "$STARTED")" = 2 ]; do sleep 0.1; done; '
    f'exec {BIN / "flashu"} "$@"',
}


@pytest.mark.slow
def test_slurms_script_starts_nodes_and_a_run_that_share_a_token_of_their_own(user, tmp_path):
    """Slurm's commands start local processes; Ray, its nodes and the run are real.

    That no token is made where RAY_AUTH_MODE says that none is wanted is in tests/cluster/test_deploy.py.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in SLURM.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    folder, said = Path(os.environ["RAY_TMPDIR"]) / "slurm", tmp_path / "said"
    folder.mkdir()
    environment = {
        **os.environ, "PATH": f"{commands}:{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(folder), "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "one,two",
        "SLURM_CPUS_PER_TASK": "1", "SAID": str(said), "STARTED": str(tmp_path / "started"),
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    command = ["bash", ROOT / "cluster/deploy/slurm.sh", "demo", *QUICK, f"output.path={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray cluster of 2 nodes: 2 CPUs" in done.stdout
    assert "complete" in done.stdout
    assert said.read_text().splitlines() == ["token 64"] * 2
    assert not list(tmp_path.rglob("auth_token")), "it is in no file"


@pytest.mark.slow
def test_of_a_cluster_that_was_killed_it_is_said_and_ray_is_started_here(cluster, user, tmp_path):
    """This is the last test of the cluster."""
    user.setattr("jobs.driver.run.GenerationWork", NoModel)
    user.setenv("RAY_TMPDIR", str(cluster.folder))
    cluster.kill()
    file = cluster.folder / "ray" / "ray_current_cluster"
    address = file.read_text()  # as Ray names this host
    begun = time.monotonic()
    outcome = flashu("run", "demo", *QUICK, "cluster.address=null", f"output.path={tmp_path / 'run'}")
    assert f"No Ray answers at {address}, which {file} names: starting Ray on this machine" in outcome.out
    assert "Ray on this machine" in outcome.out
    assert "The run cannot go on: there is no model here" in outcome.out
    assert time.monotonic() - begun < 100
    for named in ("auto", address):
        refused = flashu("run", "demo", *QUICK, f"cluster.address={named}", f"output.path={tmp_path / named[:4]}")
        assert_refused(refused, "no Ray cluster can be joined at", "nothing answers there")
    assert not (tmp_path / ".ray").exists(), "a Ray of one's own leaves no token behind"
    shutil.rmtree(cluster.folder, ignore_errors=True)
