"""A fixed mix of requests, and what every layout must answer to it. No test lives here."""

import concurrent.futures
import hashlib
import json
import random

from launch import SMALL, Launcher

LONG = [3 + (7 * i * i + 5 * i) % 1500 for i in range(170)]  # more than one block, many chunks of 8

COMPLETIONS = {
    "greedy": {"prompt": "I am", "max_tokens": 20, "temperature": 0},
    "sampled": {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 1, "seed": 7, "top_p": 0.9},
    "two": {"prompt": "The bear", "max_tokens": 12, "temperature": 0.8, "seed": 3, "n": 2, "top_k": 20},
    "echo": {"prompt": LONG[:70], "max_tokens": 4, "temperature": 0, "echo": True},
    "prompt": {"prompt": LONG[40:75], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2},
    "nothing": {"prompt": LONG[:40], "max_tokens": 0, "echo": True},
    "several": {"prompt": [[5], [6, 7], LONG[:33]], "max_tokens": 6, "temperature": 1, "seed": 11},
    "long": {"prompt": LONG, "max_tokens": 8, "temperature": 0},
    "one": {"prompt": [9], "max_tokens": 1, "temperature": 0},
    "penalties": {
        "prompt": "a a a a",
        "max_tokens": 12,
        "temperature": 0.7,
        "seed": 2,
        "presence_penalty": 1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
    },
    "min_p": {"prompt": "My name is", "max_tokens": 10, "temperature": 1.2, "seed": 4, "min_p": 0.05},
    "free": {"prompt": LONG[90:107], "max_tokens": 30, "temperature": 1.5, "seed": 5, "ignore_eos": True},
}
CHATS = {
    "chat": {
        "messages": [{"role": "user", "content": "What is 2 plus 3?"}],
        "temperature": 0,
        "max_tokens": 24,
    },
    "chat sampled": {
        "messages": [
            {"role": "system", "content": "You are kind."},
            {"role": "user", "content": "Who are you?"},
        ],
        "temperature": 1,
        "seed": 9,
        "n": 2,
        "max_tokens": 16,
    },
}


def questions():
    """{name: (path, body)}"""
    found = {}
    for name, body in COMPLETIONS.items():
        extra = {"logprobs": 2, "return_token_ids": True} if name != "nothing" else {"logprobs": 2}
        found[name] = ("/v1/completions", extra | body)
    for name, body in CHATS.items():
        extra = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
        found[name] = ("/v1/chat/completions", extra | body)
    return found


def ask(program, name):
    path, body = questions()[name]
    status, answer = program.call(path, body, timeout=120)
    assert status == 200, (name, answer)
    return {key: answer.get(key) for key in ("choices", "prompt_logprobs")}


def leave_early(program, seed):
    """A client that reads some of a stream and goes."""
    chance = random.Random(seed)
    stream = program.stream(
        {
            "prompt": LONG[: chance.randint(1, 60)],
            "max_tokens": 300,
            "temperature": 1,
            "ignore_eos": True,
            "n": chance.choice([1, 1, 3]),
        }
    )
    for count, _ in enumerate(stream, 1):
        if count > chance.randint(0, 6):
            break
    stream.close()


def ask_all(program, seed=1, clients=6, leavers=8):
    """{name: answer} of all questions, several at once in an order of chance, among clients that leave."""
    names = list(questions()) + [None] * leavers
    random.Random(seed).shuffle(names)
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = [
            pool.submit(ask, program, name) if name else pool.submit(leave_early, program, seed + place)
            for place, name in enumerate(names)
        ]
        return {
            name: future.result()
            for name, future in zip(names, answers)
            if future.result() is not None or name
        }


def digest(answers):
    return hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()[:16]


def assert_same(answers, reference):
    """Names the first answer that differs: the digests of the whole say less."""
    for name, expected in reference.items():
        assert answers[name] == expected, name
    assert digest(answers) == digest(reference)


def answers_of_one_process(folder):
    """What one process with one rank answers to all of them."""
    launcher = Launcher(folder)
    try:
        program = launcher(*SMALL).wait_ready()
        answers = ask_all(program, leavers=0)
        assert program.stop() == 0
        return answers
    finally:
        launcher.clean()
