"""What deploy/ holds, as far as it shows without a cluster: schemas, flags, paths, packages."""

import functools
import importlib.resources
import json
import re
import subprocess

import jsonschema
import pytest
import yaml
from conftest import BINARY, ROOT, run

DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker/Dockerfile"
REQUIREMENTS = "python/tessera_ray/requirements.txt"


# -- Schemas

CORE = "io.k8s.api.core.v1."
POD = {"$ref": f"#/$defs/{CORE}PodTemplateSpec"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def only(required, **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


# Of kinds that Kubernetes itself does not have, the fields used here.
SPECS = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): only(
        ["leaderWorkerTemplate"],
        replicas=COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        leaderWorkerTemplate=only(
            ["workerTemplate"],
            size={"type": "integer", "minimum": 1},
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
            leaderTemplate=POD,
            workerTemplate=POD,
        ),
    ),
    ("ray.io/v1", "RayCluster"): only(
        ["headGroupSpec"],
        rayVersion={"type": "string"},
        headGroupSpec=only(["template"], rayStartParams=TEXTS, template=POD),
        workerGroupSpecs={
            "type": "array",
            "items": only(
                ["groupName", "template"],
                groupName={"type": "string"},
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                rayStartParams=TEXTS,
                template=POD,
            ),
        },
    ),
    ("v1", "Service"): {"$ref": f"#/$defs/{CORE}ServiceSpec"},
}


@functools.cache
def definitions():
    """Kubernetes' own types, and no field beside theirs."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema/v1.37.0-local"
    found = json.loads((folder / "_definitions.json").read_text())["$defs"]
    for schema in found.values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return found


def complaints(document):
    schema = only(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"type": "string"},
        kind={"type": "string"},
        metadata={"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
        spec=SPECS[document["apiVersion"], document["kind"]],
    )
    validator = jsonschema.Draft202012Validator(schema | {"$defs": definitions()})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def pods(document):
    """Every pod's specification in a document."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


@pytest.mark.parametrize("name", sorted(path.name for path in (DEPLOY / "kubernetes").iterdir()))
def test_manifests_follow_their_schemas(name):
    for document in documents(name):
        assert complaints(document) == []
        for pod in pods(document):
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} == volumes
                ports = {port["name"] for port in container.get("ports", [])}
                for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                    probe = container.get(kind, {}).get("httpGet")
                    assert probe is None or probe["port"] in ports


def test_a_wrong_field_is_seen():
    document = documents("leaderworkerset.yaml")[0]
    container = document["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]
    container["imagePullPolice"] = "Always"
    container["ports"] = [{"containerPort": "8000"}]
    document["spec"]["size"] = 2
    found = "\n".join(complaints(document))
    for part in ("imagePullPolice", "'8000'", "'size' was unexpected"):
        assert part in found


def test_service_finds_the_leader():
    group, service = documents("leaderworkerset.yaml")
    labels = group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    others = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["metadata"]["labels"]
    assert not service["spec"]["selector"].items() <= others.items()


def test_ray_cluster_offers_the_slots_that_its_launch_takes():
    (cluster,) = documents("kuberay.yaml")
    spec = cluster["spec"]
    # As bash sees it in the command line that KubeRay writes.
    slots = 0
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        value = group["rayStartParams"]["resources"]
        words = subprocess.check_output(["bash", "-c", f"printf %s {value}"], text=True)
        slots += json.loads(words)["NPU"] * group.get("replicas", 1)
    command = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["args"][0]
    assert slots == int(re.search(r"--tensor-parallel-size (\d+)", command)[1]) == 16
    assert "--distributed-executor-backend=ray" in command
    subprocess.run(["bash", "-n", "-c", command], check=True)


def test_versions_of_ray_agree():
    pinned = re.search(r"^ray==(\S+)", (ROOT / REQUIREMENTS).read_text(), re.MULTILINE)[1]
    assert documents("kuberay.yaml")[0]["spec"]["rayVersion"] == pinned
    assert f"COPY {REQUIREMENTS} " in DOCKERFILE.read_text()


# -- Commands


def test_flags_exist():
    """Every flag behind a `serve` in deploy/ and its page."""
    known = set(re.findall(r"--([a-z][a-z0-9-]*)", run("serve", "--help").stdout))
    # Of other programs.
    foreign = {"nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "kill-on-bad-exit", "job-name"}
    foreign |= {"exclusive", "output", "address", "build", "no-install-recommends", "no-cache-dir", "from"}
    seen = 0
    for path in sorted(DEPLOY.rglob("*")):
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", path.read_text() if path.is_file() else ""):
            assert flag.replace("_", "-") in known | foreign, f"{path}: --{flag}"
            seen += 1
    assert seen > 40


def test_sbatch_script_is_bash():
    script = DEPLOY / "slurm/tessera.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: sbatch" in done.stderr
    # Slurm reads its options up to the first command.
    options = re.findall(r"^#SBATCH (\S+)$", script.read_text().split("\nset ")[0], re.MULTILINE)
    assert {"--nodes=2", "--ntasks-per-node=1"} <= set(options)


def test_compose_file_has_a_head_and_two_workers():
    compose = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())
    assert compose.keys() == {"name", "x-host", "services", "secrets"}
    fields = {"image", "restart", "secrets", "volumes", "build", "hostname", "command", "environment"}
    groups = []
    for service in compose["services"].values():
        assert service.keys() <= fields | {"ports", "healthcheck"}
        assert set(service["secrets"]) <= compose["secrets"].keys()
        command = service["command"]
        groups.append(int(re.search(r"--data-parallel-start-rank (\d+)", command)[1]))
        assert f"--data-parallel-address {compose['services']['head']['hostname']} " in command
    assert groups == [0, 1, 2]
    assert compose["services"].keys() == {"head", "worker-1", "worker-2"}
    build = compose["services"]["head"]["build"]
    here = DEPLOY / "docker"
    assert (here / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).resolve() == DOCKERFILE
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert f"/deploy/docker/{compose['secrets']['cluster']['file']}" in ignored


# -- The image


def instructions():
    """[(word, rest)] of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def runs():
    return "\n".join(rest for word, rest in instructions() if word == "RUN")


def test_dockerfile_copies_what_exists():
    stages = []
    for word, rest in instructions():
        assert word in {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "EXPOSE", "CMD"}
        if word == "FROM":
            assert rest.split()[0].startswith("debian:12")
            stages += re.findall(r" AS (\w+)", rest)
        if word == "COPY":
            *sources, _ = rest.split()
            if sources[0].startswith("--from="):
                assert sources == ["--from=build", "/src/build/release/tessera"] and "build" in stages
            else:
                assert all((ROOT / source).exists() for source in sources), rest
    command = json.loads(instructions()[-1][1])
    assert command[:2] == ["tessera", "serve"] and (ROOT / command[2].lstrip("/")).is_dir()


def test_image_has_the_libraries_of_the_binary():
    """Debian's packages of what the binary is linked to are named; libc6 is in every image."""
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends (.*?) &&", runs())
    needed = re.findall(
        r"NEEDED\s+(\S+)", subprocess.run(["objdump", "-p", BINARY], capture_output=True, text=True).stdout
    )
    assert needed
    missing = set()
    for library in needed:
        done = subprocess.run(["dpkg", "-S", f"*/{library}"], capture_output=True, text=True)
        owners = {line.split(":")[0] for line in done.stdout.splitlines()}
        if not owners & {*packages.split(), "libc6", "libgcc-s1"}:
            missing.add((library, *owners))
    assert not missing
