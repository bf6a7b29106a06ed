"""What `./dev bench peers` needs beforehand: the peers, built natively, and one model in both engines' forms.

All of it lies in a cache outside the source tree (XDG_CACHE_HOME, or ~/.cache); what is there is kept. Called
by peers.py. Standard library only; llama.cpp comes from PyPI, as llama-cpp-python's source package ships it.
"""

import hashlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = pathlib.Path(os.environ.get("TESSERA_BINARY", ROOT / "build/release/tessera"))
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "tessera/peers"
LLAMA = "llama_cpp_python-0.3.36"  # the PyPI source package whose llama.cpp is built
LLAMA_TOOLS = ["llama-bench", "llama-batched-bench"]
LLAMA_SWITCHES = ["GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_MTMD=OFF"]
LLAMA_SWITCHES += [f"LLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP")]
ONEDNN_SOURCE = ROOT / "bench/peers/onednn_gemm.cc"
SIZE_GB = {"r1-slice": 16, "toy": 0.1}  # of both forms
BUILD_GB = 1


def processor():
    """(name, flags that matter) of the CPU."""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    found = {key: re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("model name", "flags")}
    flags = found["flags"][1].split() if found["flags"] else []
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return found["model name"][1] if found["model name"] else "unknown", [f for f in wanted if f in flags]


def run(command, **settings):
    """The output of a command; the end of its words when it fails."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, **settings)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def native_folder():
    """Builds are native: each kind of CPU and each version of the peers has its own."""
    key = [LLAMA, *LLAMA_SWITCHES, processor()[0], *processor()[1]]
    return CACHE / hashlib.sha256(" ".join(key).encode()).hexdigest()[:12]


def build_llama(folder):
    if all((folder / tool).exists() for tool in LLAMA_TOOLS):
        return
    archive = CACHE / f"{LLAMA}.tar.gz"
    if not archive.exists():
        print(f"fetching {LLAMA}", flush=True)
        run([sys.executable, "-m", "venv", CACHE / "venv"])
        name, version = LLAMA.replace("_", "-").rsplit("-", 1)
        pip = [CACHE / "venv/bin/pip", "download", "--no-deps", "--no-binary", name, "--dest", CACHE]
        run([*pip, f"{name}=={version}"])
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        run(["tar", "-xzf", archive, "-C", scratch])
        source, build = pathlib.Path(scratch) / LLAMA / "vendor/llama.cpp", pathlib.Path(scratch) / "build"
        print("building llama.cpp (minutes)", flush=True)
        switches = [f"-D{switch}" for switch in ("CMAKE_BUILD_TYPE=Release", *LLAMA_SWITCHES)]
        run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *switches])
        run(["cmake", "--build", build, "--target", *LLAMA_TOOLS])
        for tool in LLAMA_TOOLS:
            shutil.copy2(build / "bin" / tool, folder / f"{tool}.part")
            (folder / f"{tool}.part").rename(folder / tool)


def build_onednn(folder):
    target = folder / "onednn_gemm"
    if not target.exists() or target.stat().st_mtime < ONEDNN_SOURCE.stat().st_mtime:
        print("building the program on oneDNN", flush=True)
        run(["g++", "-std=c++20", "-O2", ONEDNN_SOURCE, "-o", target, "-ldnnl"])


def make_model(preset):
    """Both forms of the model; a run that was cut off leaves no whole file behind."""
    folder, gguf = CACHE / preset, CACHE / f"{preset}.gguf"
    if folder.exists() and gguf.exists():
        return
    parts = [CACHE / f"{preset}.part", CACHE / f"{preset}.gguf.part"]
    for path in (folder, gguf, *parts):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    print(f"writing {folder} and {gguf.name}", flush=True)
    subprocess.run([BINARY, "make-random", parts[0], "--preset", preset, "--gguf", parts[1]], check=True)
    parts[0].rename(folder)
    parts[1].rename(gguf)


def prepare(preset, has_own_model, gemm, engine):
    """Builds and writes what is missing: for the int8 product, and for the engines."""
    folder = native_folder()
    folder.mkdir(parents=True, exist_ok=True)
    needed_gb = BUILD_GB * (engine and not (folder / LLAMA_TOOLS[-1]).exists())
    if engine and not has_own_model and not (CACHE / f"{preset}.gguf").exists():
        needed_gb += SIZE_GB[preset]
    free_gb = shutil.disk_usage(CACHE).free / 1e9
    if free_gb < needed_gb:
        sys.exit(f"{CACHE} has {free_gb:.1f} GB free, {needed_gb:.1f} are needed (XDG_CACHE_HOME moves it)")
    if gemm:
        build_onednn(folder)
    if engine:
        build_llama(folder)
        if not has_own_model:
            make_model(preset)
