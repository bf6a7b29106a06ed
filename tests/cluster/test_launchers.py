"""Hosts whose place a launcher's variables tell, and what deploy/ starts; loopback is the network."""

import re
import shlex

import pytest
import yaml
from launch import MODEL, ROOT, SMALL, Host, free_port, wait_for
from questions import ask, assert_same

DEPLOY = ROOT / "deploy"
SECRET = {"TESSERA_CLUSTER_SECRET": "known to these hosts only"}


def slurm(node):
    """Of a task of srun: two nodes of a job of three."""
    return {
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost,n[1-2]",
        "SLURM_NODEID": str(node),
    }


def open_mpi(node):
    return {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(node),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    }


def leader_worker_set(node):
    return {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": str(node), "LWS_LEADER_ADDRESS": "localhost"}


def check_one_world(programs, world, reference):
    head, *workers = programs
    ranks = [rank for program in programs for rank in program.ranks()]
    assert sorted(ranks) == list(range(world)) and len(head.ranks()) < world
    assert_same({"long": ask(head, "long")}, {"long": reference["long"]})
    assert head.stop() == 0
    assert [worker.wait() for worker in workers] == [0] * len(workers)


@pytest.mark.parametrize(
    "launcher, address",
    [(slurm, ()), (open_mpi, ("--master-addr", "127.0.0.1")), (leader_worker_set, ())],
    ids=["slurm", "open_mpi", "leader_worker_set"],
)
def test_two_hosts_by_environment(launch, reference, launcher, address):
    """The same command on both."""
    flags = (*SMALL, "-tp", "2", "--master-port", free_port(), *address)
    worker, head = (launch(*flags, env=SECRET | launcher(node)) for node in (1, 0))
    head.wait_ready()
    assert "as if --nnodes 2 --node-rank 0 --master-addr" in head.text()
    assert "as if --nnodes 2 --node-rank 1 --master-addr" in worker.text()
    check_one_world([head, worker], 2, reference)


def test_several_processes_per_host_are_refused(launch):
    program = launch(*SMALL, "-tp", "2", env=open_mpi(0) | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert program.wait() == 2
    assert "mpirun --map-by ppr:1:node" in program.text()


def test_head_whose_name_means_loopback_says_so(launch):
    """As 127.0.1.1 in a hosts file does; 127.1 is another way to write 127.0.0.1."""
    flags = (*SMALL, "-tp", "2", "--nnodes", "2", "--master-addr", "127.1", "--master-port", free_port())
    head = launch(*flags, env=SECRET)
    wait_for(lambda: "waiting on" in head.text(), 20, head.text)
    assert "'127.1' is 127.0.0.1 on this host, which no other host can reach" in head.text()
    assert head.stop() in (0, 1)


SRUN = """#!/bin/bash
# srun whose nodes are all this one: the command runs once for each, a signal reaches all.
while [[ $1 == --* ]]; do
  [[ $1 == --nodes=* ]] && nodes=${1#*=}
  shift
done
export SLURM_STEP_NUM_NODES=$nodes SLURM_STEP_NUM_TASKS=$nodes SLURM_STEP_NODELIST=localhost,n[1-9]
trap 'kill $(jobs -p)' TERM
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & done
until wait; do :; done
"""


class Batch(Host):
    """Where sbatch runs the script, with the model and the flags as its arguments."""

    def command(self, binary, subcommand, *arguments):
        script = DEPLOY / "slurm/tessera.sbatch"
        return ["env", f"TESSERA={binary}", "bash", str(script), *map(str, arguments)]


def test_slurm_script(launch, tmp_path, reference):
    """deploy/slurm: the real script and the real server; srun is the one above."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "1"}
    flags = (*SMALL, "-tp", "2", "--master-port", free_port())
    job = launch(*flags, host=Batch(), env=env).wait_ready()
    assert sorted(job.ranks()) == [0, 1]
    assert "as if --nnodes 2 --node-rank 1 --master-addr localhost" in job.text()
    assert "no cluster secret" not in job.text()
    assert_same({"long": ask(job, "long")}, {"long": reference["long"]})
    assert job.stop() == 0


def local(words, changes):
    """A command's flags with what is of its machine replaced by what is of this one."""
    found = []
    for word in words:
        for old, new in changes.items():
            word = word.replace(old, str(new))
        found.append(word)
    return found


def test_leader_worker_set_manifest(launch, reference):
    """deploy/kubernetes/leaderworkerset.yaml: the pods' own commands, sixteen ranks of tiny-r1."""
    text = (DEPLOY / "kubernetes/leaderworkerset.yaml").read_text()
    group = next(yaml.safe_load_all(text))["spec"]["leaderWorkerTemplate"]
    port, programs = free_port(), []
    for node, template in enumerate((group["leaderTemplate"], group["workerTemplate"])):
        container = template["spec"]["containers"][0]
        command = container["command"] + container["args"]
        assert command[:3] == ["tessera", "serve", "/models/deepseek_r1_w8a8"]
        flags = local(command[3:], {"0.0.0.0": "127.0.0.1"})
        env = SECRET | leader_worker_set(node) | {"GLOO_SOCKET_IFNAME": "lo", "HCCL_SOCKET_IFNAME": "lo"}
        programs.append(launch(*flags, "--port", "0", "--master-port", port, env=env))
    programs[0].wait_ready()
    check_one_world(programs, 16, reference)


def test_compose_file(launch, tmp_path, reference):
    """deploy/docker/compose.yaml: the commands of its three services, each a program here."""
    services = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())["services"]
    secret = tmp_path / "secret"
    secret.write_text("known to these containers only\n")
    secret.chmod(0o600)
    changes = {
        "/models/tiny-r1": MODEL,
        "12370": free_port(),
        "/run/secrets/cluster": secret,
        "0.0.0.0": "127.0.0.1",
    }
    programs = []
    for service in services.values():
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["command"])
        words = ["127.0.0.1" if word == "head" else word for word in shlex.split(text)]
        assert words[:2] == ["vllm-mindspore", "serve"]
        programs.append(launch(*local(words[2:], changes), "--port", "0", model=None))
    programs[0].wait_ready()
    for program in programs:
        assert "no cluster secret" not in program.text()
    check_one_world(programs, 3, reference)
