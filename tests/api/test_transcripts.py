"""Plays tests/api/transcripts/*.txt against a real server: requests as text, and what must come back.

A file holds cases. Each begins with a line `=== name`; then come, in this order:
  > METHOD PATH            the request, followed by `Header: value` lines and, after a blank line, its body
  < STATUS                 the answer, followed by lines that its header must contain, and after a blank line
                           what its body must look like
Every line of the expected body is one demand:
  text                     the body contains it
  !text                    it does not
  ~regex                   the body matches it somewhere
  path = JSON              the value at this path of the JSON body, such as choices.0.text = "x"
  path ~ regex             that value, as JSON text, matches
  event N path = JSON      the same for the N-th event of a stream (negative: from the end)
A first line `@guarded` picks the server with an API key. A body line `<<<N x` stands for N times x.
"""
import http.client
import json
import pathlib
import re

import pytest

FOLDER = pathlib.Path(__file__).parent / "transcripts"


class Case:
    def __init__(self, name, lines, guarded):
        self.name, self.guarded = name, guarded
        split = next(i for i, line in enumerate(lines) if line.startswith("< "))
        (first, *self.headers), body = self.parts(lines[:split])
        self.method, self.path = first.removeprefix("> ").split(" ", 1)
        self.body = "\n".join(re.sub(r"<<<(\d+) (.)", lambda m: m[2] * int(m[1]), line) for line in body)
        (status, *self.wanted_headers), self.demands = self.parts(lines[split:])
        self.status = int(status.removeprefix("< "))

    @staticmethod
    def parts(lines):
        while lines and not lines[-1].strip():
            lines = lines[:-1]
        blank = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
        return lines[:blank], [line for line in lines[blank + 1:] if line.strip()]


def read_cases():
    for path in sorted(FOLDER.glob("*.txt")):
        lines = [line for line in path.read_text().split("\n") if not line.startswith("#")]
        guarded = "@guarded" in lines[:3]
        starts = [i for i, line in enumerate(lines) if line.startswith("=== ")] + [len(lines)]
        for begin, end in zip(starts, starts[1:]):
            case = Case(lines[begin][4:].strip(), lines[begin + 1:end], guarded)
            yield pytest.param(case, id=f"{path.stem}: {case.name}")


def at(value, path):
    for step in path.split("."):
        value = value[int(step) if isinstance(value, list) else step]
    return value


def events(body):
    return [json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]"
            for line in body.split("\n\n") if line.startswith("data: ")]


def check(demand, body):
    if found := re.match(r"(?:event (-?\d+) )?([\w.]+) ([=~]) (.+)$", demand):
        number, path, operator, wanted = found.groups()
        root = json.loads(body) if number is None else events(body)[int(number)]
        value = at(root, path)
        if operator == "=":
            assert value == json.loads(wanted), f"{demand}\ngot {json.dumps(value, ensure_ascii=False)}"
        else:
            assert re.search(wanted, json.dumps(value, ensure_ascii=False)), f"{demand}\ngot {value!r}"
    elif demand.startswith("!"):
        assert demand[1:] not in body, body
    elif demand.startswith("~"):
        assert re.search(demand[1:], body), f"{demand}\n{body}"
    else:
        assert demand in body, f"{demand}\n{body}"


@pytest.mark.parametrize("case", list(read_cases()))
def test_transcript(case, request):
    server = request.getfixturevalue("guarded_server" if case.guarded else "server")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = dict(line.split(": ", 1) for line in case.headers)
    if case.body and "Content-Type" not in headers:
        headers["Content-Type"] = "application/json"
    connection.request(case.method, case.path, case.body.encode() if case.body else None, headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    assert answer.status == case.status, body
    head = "".join(f"{name}: {value}\n" for name, value in answer.getheaders())
    for wanted in case.wanted_headers:
        assert re.search(wanted, head, re.IGNORECASE), head
    for demand in case.demands:
        check(demand, body)
