"""The test runner behind `./dev test` and `./dev fuzz`: suites, what each needs built, what each counted.

Unit tests are found in CMake's own list, fuzzers in the CMakeLists files: a new one appears by itself. It
contains no test. Standard library only; the client tests run in a virtual environment of their own.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
CORPORA = ROOT / "tests" / "fuzz" / "corpus"
PYTEST_FOLDERS = ("api", "text", "cli", "cluster", "ray")
# Of tests/cluster under the sanitizer: one layout of four ranks.
SANITIZED_LAYOUT = "dp2tp2ep4"
TSAN_ROOMS = ("base", "comm", "engine", "cluster", "http")
LIMIT_S = 1800  # of one suite
FULL_LIMIT_S = 6 * 3600  # of one suite of the full run, where the hash has thousands of cells


@dataclasses.dataclass
class Suite:
    name: str
    preset: str  # what must be built; "" for nothing
    command: list  # a "{report}" in it becomes the path of the XML report that the command writes
    cases: int = 0  # of a command without a report: what it counts for
    fast: bool = False
    env: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    output: str = ""


def fuzzers():
    """Names of the fuzz targets, as the CMakeLists files declare them."""
    names = set()
    for path in [*(ROOT / "src").glob("*/CMakeLists.txt"), *(ROOT / "tests").rglob("CMakeLists.txt")]:
        names.update(re.findall(r"^\s*tessera_fuzzer\(\s*(\w+)", path.read_text(), re.MULTILINE))
    return sorted(names)


def fuzz_target(name):
    """The folder of a fuzzer's corpus: its name without the word fuzz."""
    return re.sub(r"^fuzz_|_fuzz(er)?$", "", name)


def unit_tests(preset):
    """[(name, command)] of the configured preset."""
    listing = subprocess.run(
        ["ctest", "--test-dir", BUILD / preset, "--show-only=json-v1"], capture_output=True, text=True
    )
    if listing.returncode != 0:
        return []
    return [
        (test["name"], test["command"]) for test in json.loads(listing.stdout)["tests"] if "command" in test
    ]


def find_program(preset, name):
    found = [path for path in (BUILD / preset).rglob(name) if path.is_file() and os.access(path, os.X_OK)]
    return str(found[0]) if found else str(BUILD / preset / name)


def python():
    return BUILD / "venv" / "bin" / "python"


def make_venv():
    """Creates build/venv from tests/requirements.txt unless a stamp says that it is there."""
    wanted = hashlib.sha256((ROOT / "tests/requirements.txt").read_bytes()).hexdigest()
    stamp = BUILD / "venv" / "stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return True
    print("==> Python packages of tests/requirements.txt into build/venv", flush=True)
    for command in (
        ["/usr/bin/python3", "-m", "venv", "--clear", BUILD / "venv"],
        [python(), "-m", "pip", "install", "--quiet", "-r", ROOT / "tests/requirements.txt"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stdout + done.stderr)
            return False
    stamp.write_text(wanted)
    return True


def build(preset, *targets):
    return subprocess.run([ROOT / "dev", "build", preset, *targets]).returncode == 0


def sanitizer_env(preset):
    if preset not in ("asan", "tsan"):
        return {}
    return {
        "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    }


def suites(full):
    """Every suite, quickest kinds first."""
    found = []
    for preset in ("release", "asan", "tsan"):
        env = sanitizer_env(preset) | ({"TESSERA_HASH": "full"} if full and preset == "release" else {})
        for name, command in unit_tests(preset):
            if preset == "tsan" and not name.startswith(TSAN_ROOMS):
                continue
            # Under a sanitizer the hash product and golden logits say no more than the model's own tests.
            if preset != "release" and re.match("hash|golden", name):
                continue
            found.append(
                Suite(
                    f"{preset}/{name}",
                    preset,
                    [*command, "--gtest_brief=1", "--gtest_output=xml:{report}"],
                    fast=preset == "release" and not re.match("hash|layout", name),
                    env=env,
                )
            )
        if preset == "tsan":
            continue
        env = env | {"TESSERA_BUILD": str(BUILD / preset)}
        for folder in PYTEST_FOLDERS:
            if preset == "asan" and folder in ("text", "ray"):
                continue  # Rust and Python, which the sanitizer does not see
            if list((ROOT / "tests" / folder).glob("test_*.py")):
                command = pytest(f"tests/{folder}")
                if preset == "asan" and folder == "cluster":
                    command += ["-k", SANITIZED_LAYOUT]
                found.append(Suite(f"{preset}/{folder}", preset, command, env=env))
        for name in fuzzers():
            found.append(
                Suite(
                    f"{preset}/{name}",
                    preset,
                    [find_program(preset, name), str(CORPORA / fuzz_target(name))],
                    cases=1,
                    env=env,
                )
            )
    if "avx512_bf16" not in (flags := pathlib.Path("/proc/cpuinfo").read_text()):
        found.append(emulated("avx512bf16" if "avx512_vnni" in flags else "avx512*"))
    smoke = ROOT / "tests/cli/test_smoke.py"
    env = {"TESSERA_BUILD": str(BUILD / "release")}
    found.append(Suite("release/smoke", "release", pytest(str(smoke.relative_to(ROOT))), fast=True, env=env))
    found.append(Suite("tidy", "release", ["/usr/bin/python3", "tests/tidy.py"], cases=1, fast=True, env=env))
    return found


def emulated(isa):
    """The kernels of an instruction set that this CPU lacks, on an emulated one. Of the slow tests only the
    widest set runs: narrower ones share its sources."""
    tests = (f"*Elementwise*/{isa}", "*Gemm*/avx512bf16", "*Attention*/avx512bf16")
    words = [f"--gtest_filter={':'.join(tests)}", "--gtest_brief=1", "--gtest_output=xml:{report}"]
    program = find_program("release", "kernels_test")
    return Suite("release/emulated", "release", [str(ROOT / "dev"), "emulate", program, *words])


def pytest(path):
    return [str(python()), "-m", "pytest", "-q", "-p", "no:cacheprovider", path, "--junitxml={report}"]


def read_report(path):
    """(passed, failed, skipped) of a GoogleTest or pytest report."""
    root = ET.parse(path).getroot()
    nodes = list(root.iter("testsuite")) if "tests" not in root.attrib else [root]
    total = failed = skipped = 0
    for node in nodes:
        total += int(node.get("tests", 0))
        failed += int(node.get("failures", 0)) + int(node.get("errors", 0))
        skipped += int(node.get("skipped", 0)) + int(node.get("disabled", 0))
    return max(total - failed - skipped, 0), failed, skipped


def run(suite):
    reports = BUILD / "reports"
    reports.mkdir(exist_ok=True)
    report = reports / (suite.name.replace("/", "-") + ".xml")
    report.unlink(missing_ok=True)
    command = [part.replace("{report}", str(report)) for part in suite.command]
    limit = FULL_LIMIT_S if "TESSERA_HASH" in suite.env else LIMIT_S
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | suite.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
        )
        status, output = done.returncode, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as expired:
        status, output = -1, (expired.stdout or b"").decode(errors="replace") + f"\nno end after {limit} s"
    except OSError as error:
        status, output = -1, f"{command[0]}: {error.strerror}"
    outcome = Outcome(output=output)
    if report.exists():
        outcome.passed, outcome.failed, outcome.skipped = read_report(report)
        if status != 0 and outcome.failed == 0:  # it crashed or leaked after its last case
            outcome.failed = 1
    elif status == 0:
        outcome.passed = suite.cases
        outcome.failed = 0 if suite.cases else 1  # a suite that reports nothing has not run
    else:
        outcome.failed = 1
    return outcome


def chosen(suite, names, fast):
    if names:
        return any(
            fnmatch.fnmatch(suite.name, name)
            or suite.name.startswith(name + "/")
            or suite.name.endswith("/" + name)
            for name in names
        )
    return suite.fast if fast else suite.name != "release/smoke"  # the smoke test is a part of release/cli


def prepare(names, fast):
    """Builds what the run needs. Returns the presets that could not be built."""
    presets = ["release"] if names != ["tidy"] else []  # tidy reads sources only
    if names:
        presets += [preset for preset in ("asan", "tsan") if any(preset in name for name in names)]
    elif not fast:
        presets += ["asan", "tsan"]
    broken = []
    for preset in presets:
        targets = [] if preset != "tsan" else tsan_targets()
        if not build(preset, *targets):
            broken.append(preset)
    return broken


def tsan_targets():
    if not (BUILD / "tsan" / "build.ninja").exists() and not build("tsan", "textkit_build"):
        return []
    return [name for name, _ in unit_tests("tsan") if name.startswith(TSAN_ROOMS)]


def test(arguments):
    started = time.monotonic()
    fast, full = "fast" in arguments, "full" in arguments
    names = [name for name in arguments if name not in ("fast", "full")]
    summary = BUILD / "test-summary.txt"
    summary.unlink(missing_ok=True)
    total, failures = Outcome(), []
    for preset in prepare(names, fast):
        total.failed += 1
        failures.append((f"build {preset}", "see the build's output above"))
    picked = [suite for suite in suites(full) if chosen(suite, names, fast)]
    if any("pytest" in suite.command for suite in picked) and not make_venv():
        failures.append(("Python packages", "could not be installed"))
        total.failed += 1
    for suite in picked:
        begin = time.monotonic()
        outcome = run(suite)
        counts = (
            f"{outcome.passed} passed"
            + (f", {outcome.failed} FAILED" if outcome.failed else "")
            + (f", {outcome.skipped} skipped" if outcome.skipped else "")
        )
        print(f"    {suite.name:<32} {counts:<32} {time.monotonic() - begin:6.1f} s", flush=True)
        total.passed += outcome.passed
        total.failed += outcome.failed
        if outcome.failed:
            failures.append((suite.name, outcome.output))
    for name, output in failures:
        print(f"\n---- {name}\n" + "\n".join(output.splitlines()[-120:]))
    if not picked:
        print(f"no suite is called {' '.join(names)}; `./dev test list` shows them all")
        total.failed += 1
    line = f"{total.passed} passed, {total.failed} failed"
    print(f"\n{time.monotonic() - started:.0f} s\n{line}", flush=True)
    summary.write_text(line + "\n")
    return 1 if total.failed else 0


def fuzz(arguments):
    """Fuzzes one target or all, then keeps what is new and small in the corpus."""
    seconds = next((int(text) for text in arguments if text.isdigit()), 60)
    wanted = [text for text in arguments if not text.isdigit()]
    names = [name for name in fuzzers() if not wanted or name in wanted or fuzz_target(name) in wanted]
    if not names:
        print(f"no such fuzz target; there are: {', '.join(fuzzers())}")
        return 2
    if not build("fuzz", *names):
        return 1
    status = 0
    for name in names:
        corpus, work = CORPORA / fuzz_target(name), BUILD / "fuzz-corpus" / name
        corpus.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        program = find_program("fuzz", name)
        print(f"==> {name}, {seconds} s", flush=True)
        limits = [
            "-timeout=20",
            "-rss_limit_mb=4096",
            "-max_len=16384",
            f"-artifact_prefix={BUILD}/fuzz-finding-{name}-",
        ]
        status |= subprocess.run(
            [program, f"-max_total_time={seconds}", "-print_final_stats=1", *limits, work, corpus]
        ).returncode
        status |= subprocess.run([program, "-merge=1", *limits, corpus, work], capture_output=True).returncode
        print(f"    {len(list(corpus.iterdir()))} files in {corpus.relative_to(ROOT)}")
    return 1 if status else 0


def main(arguments):
    BUILD.mkdir(exist_ok=True)
    if arguments[:1] == ["--fuzz"]:
        return fuzz(arguments[1:])
    if arguments[:1] == ["list"]:
        for suite in suites(full=False):
            print(suite.name)
        return 0
    return test(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
