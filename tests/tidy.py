"""The house rules that a machine can check: layers, libraries, sizes, dead files, names, documents.

Behind `./dev tidy`. One function per rule; each gives lines "path:line: what is wrong".
`./dev tidy --fix` formats the C++ first. It compiles nothing; flags come from the tables in the sources.
"""

import ast
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_FILE, MAX_FUNCTION, MAX_COLUMNS, MAX_SCRIPT = 650, 70, 110, 350
DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
ROOMS = ("base", "comm", "kernels", "text", "model", "engine", "cluster", "http", "cli")

# A library stands in one .cc; these are the exceptions, each with its reason.
LIBRARY_PLACES = {
    "gtest": None,  # every test
    "fmt": ("src/base/format.h",),  # the one face for formatting
    "immintrin.h": ("src/kernels/", "src/base/"),  # the compiler's own header
    "textkit.h": ("src/text/",),  # our own crate
}
BANNED_WORDS = {"manager", "helper", "util", "utils", "impl", "context", "data", "info"}


def tracked(*endings):
    """Files of the repository, new ones included, deleted ones not."""
    names = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return sorted(name for name in set(names) if name.endswith(endings) and (ROOT / name).is_file())


def lines_of(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def sources():
    return [name for name in tracked(".cc", ".h") if name.startswith(("src/", "tests/"))]


def includes(name):
    """(line, path, quoted) of each include."""
    for number, line in enumerate(lines_of(name), 1):
        if found := re.match(r'\s*#\s*include\s+(["<])([^">]+)[">]', line):
            yield number, found[2], found[1] == '"'


def layer_table():
    """{room: what it may include}, from the table in ARCHITECTURE.md."""
    table = {}
    for line in lines_of("ARCHITECTURE.md"):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        name = cells[0].strip("`")
        if len(cells) >= 2 and name in ROOMS:
            table[name] = {word.strip("` ") for word in cells[-1].split(",")} - {"-"}
    return table


def check_layers():
    table = layer_table()
    for room in ROOMS:
        if room not in table:
            yield f"ARCHITECTURE.md: the table of folders has no row for {room}"
    for name in sources():
        room = name.split("/")[1]
        if not name.startswith("src/") or room not in table or "everything" in table[room]:
            continue
        for number, path, quoted in includes(name):
            target = path.split("/")[0]
            if quoted and target in ROOMS and target != room and not {target, path} & table[room]:
                yield f"{name}:{number}: {room} may not include {path} (ARCHITECTURE.md)"


def library_of(path, quoted):
    """The name of the third-party library behind an include, or None."""
    if path in LIBRARY_PLACES:
        return path
    if quoted or "/" not in path or path.startswith(("sys/", "netinet/", "arpa/", "linux/")):
        return None
    parts = path.split("/")
    return "/".join(parts[:2]).removesuffix(".hpp") if parts[0] == "boost" else parts[0]


def check_libraries():
    users = {}
    for name in sources():
        for number, path, quoted in includes(name):
            library = library_of(path, quoted)
            if library is None or name.startswith("tests/"):
                continue
            if library in LIBRARY_PLACES:
                places = LIBRARY_PLACES[library]
                if places is not None and not name.startswith(places):
                    yield f"{name}:{number}: {path} belongs to {', '.join(places)}"
            elif not name.endswith(".cc"):
                yield f"{name}:{number}: {path} in a header; a library stays in one .cc"
            else:
                users.setdefault(library, set()).add(name)
    for library, names in sorted(users.items()):
        if len(names) > 1:
            yield f"{library} is included by {len(names)} files, wanted one: {', '.join(sorted(names))}"


def block_functions(lines, rust):
    """(first line, length) of every block at the level of a function or a method."""
    opened = None
    for number, line in enumerate(lines, 1):
        if opened is None or not line.startswith(" " * opened[1] + "}"):
            level = len(line) - len(line.lstrip())
            starts = (
                line.rstrip().endswith("{")
                and level in (0, 4 if rust else 2)
                and (opened is None or level < opened[1])
            )
            words = r"\s*(namespace|class|struct|union|enum|extern|constexpr|const|template|public|private)\b"
            named = (
                " fn " in f" {line}"
                if rust
                else not re.match(words, line) and not line.rstrip().endswith("= {")
            )
            if starts and named:
                opened = (number, level)
            continue
        yield opened[0], number - opened[0] + 1
        opened = None


def check_sizes():
    for name in tracked(".cc", ".h", ".py", ".rs", "dev", ".ci/run", ".cmake", "CMakeLists.txt"):
        lines = lines_of(name)
        limit = MAX_SCRIPT if name == "dev" else MAX_FILE
        if len(lines) > limit:
            yield f"{name}: {len(lines)} lines, at most {limit}"
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_COLUMNS:
                yield f"{name}:{number}: {len(line)} columns, at most {MAX_COLUMNS}"
        if name.endswith((".cc", ".h", ".rs")):
            functions = block_functions(lines, name.endswith(".rs"))
        elif name.endswith(".py"):
            functions = (
                (node.lineno, node.end_lineno - node.lineno + 1)
                for node in ast.walk(ast.parse("\n".join(lines)))
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            )
        else:
            continue
        for number, length in functions:
            if length > MAX_FUNCTION:
                yield f"{name}:{number}: a function of {length} lines, at most {MAX_FUNCTION}"


def check_first_paragraph():
    for name in tracked(".cc", ".h", ".py", ".rs", "dev", ".ci/run", ".cmake"):
        lines = [line for line in lines_of(name) if not line.startswith("#!")]
        if (
            not lines
            or not lines[0].startswith(("//", "/*", "#", '"""'))
            or lines[0].startswith(("#include", "#pragma"))
        ):
            yield f"{name}:1: begins without a paragraph that says what it is"


def check_dead_files():
    lists = {name: (ROOT / name).read_text() for name in tracked("CMakeLists.txt")}
    included = {path for name in sources() for _, path, _ in includes(name)}
    included |= {path.split("/")[-1] for path in included if "/" not in path}
    cmake = "\n".join(lists.values()) + "\n".join((ROOT / name).read_text() for name in tracked(".cmake"))
    for name in sources():
        short = name.removeprefix("src/").removeprefix("tests/")
        base = name.split("/")[-1]
        if name.endswith(".cc") and not re.search(rf"(?<![\w-]){re.escape(base)}\b", cmake):
            yield f"{name}: in no CMakeLists.txt"
        if name.endswith(".h") and not included & {short, name.removeprefix("src/"), base}:
            yield f"{name}: nobody includes it"
    texts = "\n".join(
        (ROOT / name).read_text(errors="replace")
        for name in tracked(".py", ".cc", ".txt", ".md", "dev", ".ci/run", ".cmake")
    )
    for name in tracked(".py"):
        base = name.split("/")[-1]
        found = re.match(r"tests/(api|text|cli|cluster|ray)/(test_\w+|\w+_test|conftest)\.py$", name)
        stem = rf"(?<![\w.]){re.escape(base.removesuffix('.py'))}(?!\w)"
        if not found and len(re.findall(stem, texts)) < 1:
            yield f"{name}: nothing runs, imports or names it"


def check_names():
    for name in tracked(".cc", ".h", ".py", ".rs"):
        for word in re.split(r"[/_.-]", name.removesuffix(".rs")):
            if word in BANNED_WORDS:
                yield f"{name}: '{word}' is not a name (it says nothing)"
        if not name.startswith(("src/", "tests/")) or not name.endswith((".cc", ".h")):
            continue
        for number, line in enumerate(lines_of(name), 1):
            for found in re.finditer(r"\b(?:class|struct|enum class|namespace|using)\s+(\w+)", line):
                words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", found[1])}
                # Types of the C library keep their names.
                for word in words & BANNED_WORDS:
                    yield f"{name}:{number}: '{found[1]}' contains '{word}', which says nothing"


def check_places():
    """Nothing names a machine, a private folder or a package registry."""
    wrong = re.compile(
        r"/work/|(?<![\w.])/root/|/home/\w|deb\.debian\.org|(?<!/)\bcrates\.io|pypi\.org|pythonhosted"
        r"|registry\.npmjs"
    )
    for name in tracked(
        ".cc", ".h", ".py", ".rs", ".md", ".txt", ".toml", ".cmake", ".json", "dev", ".ci/run"
    ):
        if name == "tests/tidy.py" or name.startswith(("models/", "tests/fuzz/corpus/")):
            continue
        for number, line in enumerate(lines_of(name), 1):
            if found := wrong.search(line):
                yield f"{name}:{number}: names '{found[0]}'"


def check_format():
    names = [name for name in sources() if name.endswith((".cc", ".h"))]
    done = subprocess.run(["clang-format-19", "--dry-run", *names], cwd=ROOT, capture_output=True, text=True)
    for name in sorted(set(re.findall(r"^(\S+?):\d+:\d+: warning", done.stderr, re.MULTILINE))):
        yield f"{name}: not formatted (`./dev tidy --fix`)"


def known_words():
    """What documents may name: (dev commands, subcommands, flags)."""
    dev = set(re.search(r"^  (serve \| .*?)\)", (ROOT / "dev").read_text(), re.MULTILINE)[1].split(" | "))
    main = (ROOT / "src/cli/main.cc").read_text() + (ROOT / "src/cli/bench.cc").read_text()
    commands = set(re.findall(r'^\s+\{"([a-z-]+)", "', main, re.MULTILINE))
    tables = "".join(
        (ROOT / name).read_text()
        for name in tracked(".cc")
        if name.startswith(("src/cli/", "src/model/random_")) and not name.endswith("_test.cc")
    )
    scripts = "".join((ROOT / name).read_text() for name in tracked(".py") if name.startswith("bench/"))
    flags = set(re.findall(r'"([a-z][a-z0-9-]*)"', tables)) | {"help", "version", "config", "fix"}
    flags |= set(re.findall(r'add_argument\("--([a-z-]+)"', scripts))
    return dev, commands, flags


def check_path_claims(document, number, line):
    for target in re.findall(r"\]\(([^)#]+)", line):
        if "://" not in target and not (ROOT / document).parent.joinpath(target).exists():
            yield f"{document}:{number}: the link {target} leads nowhere"
    for word in re.findall(r"`([\w.-]+(?:/[\w.*-]+)+/?)`", line):
        if (
            word.startswith(("build/", "v1/", "models/tiny-r1"))
            or "*" in word
            or word.startswith("text/event")
        ):
            continue
        if not (ROOT / word).exists() and not (ROOT / "src" / word).exists():
            yield f"{document}:{number}: there is no {word}"


def check_claims():
    dev, commands, flags = known_words()
    foreign = re.compile(
        r"cmake|ctest|pytest|gtest|cargo|apt|pip|curl|git |srun|sbatch|mpirun|docker|kubectl|ray start"
        r"|deps --ray"
    )
    for document in DOCUMENTS:
        if not (ROOT / document).exists():
            yield f"{document}: missing"
            continue
        for number, line in enumerate(lines_of(document), 1):
            yield from check_path_claims(document, number, line)
            for command in re.findall(r"\./dev ([a-z]+)", line):
                if command not in dev:
                    yield f"{document}:{number}: there is no ./dev {command}"
            for command in re.findall(r"(?:`|^\s*(?:\./|\S*/)?)tessera ([a-z-]+)", line):
                if command not in commands:
                    yield f"{document}:{number}: there is no tessera {command}"
            if foreign.search(line):
                continue
            for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", re.sub("--flag|--no-x", "", line)):
                name = flag.replace("_", "-")
                if name not in flags and name.removeprefix("no-") not in flags:
                    yield f"{document}:{number}: there is no flag --{flag}"


RULES = [
    check_layers,
    check_libraries,
    check_sizes,
    check_first_paragraph,
    check_dead_files,
    check_names,
    check_places,
    check_format,
    check_claims,
]


def main(arguments):
    if "--fix" in arguments:
        subprocess.run(["clang-format-19", "-i", *sources()], cwd=ROOT, check=True)
    complaints = [complaint for rule in RULES for complaint in rule()]
    for complaint in complaints:
        print(complaint)
    print(f"tidy: {len(RULES)} rules, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
