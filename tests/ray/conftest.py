"""A Ray cluster of two nodes with 8 NPU each, in network namespaces of their own. No test lives here."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tests/cluster"))

from launch import Launcher, network, why_no_namespaces  # noqa: E402
from nodes import Cluster  # noqa: E402
from questions import answers_of_one_process  # noqa: E402


@pytest.fixture(scope="session")
def ray():
    """The folder of Ray's programs, installed as a user does it."""
    done = subprocess.run([ROOT / "dev", "deps", "--ray"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build/ray/bin"


@pytest.fixture(scope="session")
def cluster(ray, tmp_path_factory):
    if reason := why_no_namespaces():
        pytest.skip(reason)
    # Short: the paths of Ray's sockets must fit 107 bytes.
    folder = tmp_path_factory.mktemp("r")
    with network(["192.5.5.5", "192.5.5.6"], "enp189s0f0") as hosts:
        cluster = Cluster(ray, folder, hosts)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.clean()


@pytest.fixture
def serve(cluster, tmp_path):
    """`tessera serve` on the first node, as from a shell in which the cluster is known."""
    launcher = Launcher(tmp_path)

    def start(*arguments, env=None, **options):
        return launcher(*arguments, host=cluster.hosts[0], env=cluster.environment() | (env or {}), **options)

    yield start
    launcher.clean()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The answers of one process with one rank."""
    return answers_of_one_process(tmp_path_factory.mktemp("reference"))
