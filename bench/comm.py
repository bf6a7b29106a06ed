"""`./dev bench comm`: Tessera's collectives beside Open MPI's, on the same shapes of this machine.

Both run as processes of this machine, over shared memory and over TCP (loopback). Arguments are those
of `tessera bench comm`. Without mpicc and mpirun (Debian: openmpi-bin, libopenmpi-dev) only our own
figures come. No figure fails it. Standard library only.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = pathlib.Path(os.environ.get("TESSERA_BINARY", ROOT / "build/release/tessera"))
PEER_SOURCE = ROOT / "bench/peers/mpi_collectives.c"
PEER = ROOT / "build/peers/mpi_collectives"
# "shm": Open MPI's own choice on one machine. "tcp": nothing but sockets.
MPI_TRANSPORT = {
    "shm": [],
    "tcp": ["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo", "--mca", "pml", "ob1"],
}


def ours(options, transport, ranks):
    """{(collective, bytes): (median, best) in microseconds}"""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [BINARY, "bench", "comm", "--transport", transport, "--ranks", str(ranks)]
        command += ["--bytes", *map(str, options.bytes)]
        command += ["--time-ms", str(options.time_ms), "--json", file.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = json.load(file)["rows"]
    return {(row["collective"], row["bytes"]): (row["median_us"], row["best_us"]) for row in rows}


def build_peer():
    """True when the MPI program can run."""
    if shutil.which("mpicc") is None or shutil.which("mpirun") is None:
        print("no mpicc and mpirun here (openmpi-bin, libopenmpi-dev): our figures alone")
        return False
    PEER.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mpicc", "-O3", "-o", PEER, PEER_SOURCE], check=True)
    return True


def theirs(options, transport, ranks):
    command = ["mpirun", "--oversubscribe", "--allow-run-as-root", "-np", str(ranks)]
    command += [*MPI_TRANSPORT[transport], PEER, str(options.time_ms), *map(str, options.bytes)]
    # Its vader transport copies by process_vm_readv, which containers may forbid; it then warns and goes on.
    environment = os.environ | {"OMPI_MCA_btl_vader_single_copy_mechanism": "none"}
    done = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, env=environment, timeout=1800
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    return {(name, int(size)): (float(median), float(best)) for name, size, median, best in rows}


def print_table(transport, ranks, own, peer):
    print(f"\n{transport}, {ranks} ranks")
    heads = f"{'us':>12}{'best':>12}{'Open MPI us':>14}{'best':>12}{'ratio':>9}{'of best':>9}"
    print(f"  {'':<15}{'bytes':>9}{heads}")
    for (collective, size), (median, best) in own.items():
        line = f"  {collective:<15}{size:>9,}{median:>12,.1f}{best:>12,.1f}"
        if other := peer.get((collective, size)):
            line += f"{other[0]:>14,.1f}{other[1]:>12,.1f}{other[0] / median:>9.2f}{other[1] / best:>9.2f}"
        print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(prog="./dev bench comm", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--bytes", type=int, nargs="+", default=[256, 14336, 1048576])
    parser.add_argument("--transport", choices=["shm", "tcp", "both"], default="both")
    parser.add_argument("--time-ms", type=int, default=100, help="of each measurement")
    parser.add_argument("--json", type=pathlib.Path, help="file for the result")
    options = parser.parse_args()
    has_peer = build_peer()
    rows = []
    print(f"{os.cpu_count()} cores; microseconds per call; a ratio above 1: Tessera is faster")
    for transport in ["shm", "tcp"] if options.transport == "both" else [options.transport]:
        for ranks in options.ranks:
            own = ours(options, transport, ranks)
            peer = theirs(options, transport, ranks) if has_peer else {}
            print_table(transport, ranks, own, peer)
            for (collective, size), times in own.items():
                rows.append(
                    {
                        "transport": transport,
                        "ranks": ranks,
                        "collective": collective,
                        "bytes": size,
                        "us": times,
                        "open_mpi_us": peer.get((collective, size)),
                    }
                )
    if options.json:
        options.json.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
