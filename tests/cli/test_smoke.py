"""A short look at the whole: one server, one request of each kind. Part of `./dev test fast`."""

from conftest import MODEL


def test_tutorial_request_answers(tiny):
    """The request of the R1 tutorial, word for word but for the path of the model."""
    body = {
        "model": MODEL,
        "prompt": "I am",
        "max_tokens": 20,
        "temperature": 0,
        "top_p": 1.0,
        "top_k": 1,
        "repetition_penalty": 1.0,
    }
    status, answer = tiny.call("/v1/completions", body)
    assert status == 200
    assert answer["model"] == MODEL
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["choices"][0]["text"].strip()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert tiny.call("/v1/completions", body)[1]["choices"] == answer["choices"]


def test_chat_thinks_and_answers(tiny):
    status, answer = tiny.call(
        "/v1/chat/completions",
        {
            "model": "tiny-r1",
            "temperature": 0,
            "messages": [{"role": "user", "content": "What is 2 plus 3?"}],
        },
    )
    assert status == 200
    message = answer["choices"][0]["message"]
    assert message["content"] and message["reasoning_content"]
    assert message["reasoning"] == message["reasoning_content"]


def test_health_and_names(tiny):
    assert tiny.call("/health")[0] == 200
    assert tiny.call("/ready")[0] == 200
    assert [card["id"] for card in tiny.call("/v1/models")[1]["data"]] == [MODEL, "tiny-r1"]
