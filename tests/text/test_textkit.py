"""The Rust crate's own unit tests. They share the crate's compiled dependencies in build/textkit."""

import pathlib
import shutil
import subprocess

from encode_tool import ROOT


def test_cargo_test_passes():
    cargo = shutil.which("cargo") or str(pathlib.Path.home() / ".cargo" / "bin" / "cargo")
    command = [cargo, "test", "--release", "--locked", "--manifest-path", ROOT / "textkit" / "Cargo.toml",
               "--target-dir", ROOT / "build" / "textkit"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test result: ok" in run.stdout
