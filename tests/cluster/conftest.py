"""Fixtures: programs that end whatever happens, hosts, and the answers of one process. No test lives here."""

import pytest
from launch import Host, Launcher, network, why_no_namespaces
from questions import answers_of_one_process


@pytest.fixture
def launch(tmp_path):
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.clean()


@pytest.fixture(scope="class")
def launch_shared(tmp_path_factory):
    """For a program that the tests of a class share."""
    launcher = Launcher(tmp_path_factory.mktemp("shared"))
    yield launcher
    launcher.clean()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The answers of one process with one rank."""
    return answers_of_one_process(tmp_path_factory.mktemp("reference"))


def hosts_of(count):
    if reason := why_no_namespaces():
        pytest.skip(reason)
    # Names and addresses of the tutorial: nobody outside of the namespaces sees them.
    with network([f"192.10.10.{10 + number}" for number in range(count)], "enp189s0f0") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def two_hosts():
    yield from hosts_of(2)


@pytest.fixture(scope="module")
def four_hosts():
    yield from hosts_of(4)


@pytest.fixture(scope="module")
def here():
    return Host()
