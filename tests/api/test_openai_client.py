"""The official openai client against a real server: both endpoints, streamed and not, logprobs, errors."""
import openai
import pytest

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url("/v1"), api_key="none", max_retries=0, timeout=60) as one:
        yield one


def test_models(client):
    assert [model.id for model in client.models.list()] == ["models/tiny-r1", "tiny-r1"]


def test_completion_and_its_stream_agree(client):
    options = dict(model="tiny-r1", prompt="I am", max_tokens=16, temperature=0,
                   extra_body={"ignore_eos": True})
    whole = client.completions.create(**options)
    assert whole.usage.completion_tokens == 16
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes[-1] == whole.choices[0].finish_reason == "length"
    assert set(finishes[:-1]) <= {None}


def test_chat_and_its_stream_agree(client):
    options = dict(model="tiny-r1", messages=QUESTION, max_tokens=48, temperature=0)
    whole = client.chat.completions.create(**options)
    message = whole.choices[0].message
    assert message.role == "assistant" and message.reasoning == message.reasoning_content
    text = {"content": "", "reasoning": "", "reasoning_content": ""}
    for chunk in client.chat.completions.create(**options, stream=True):
        for name in text:
            text[name] += getattr(chunk.choices[0].delta, name, None) or ""
    assert text["content"] == (message.content or "")
    assert text["reasoning"] == text["reasoning_content"] == (message.reasoning or "")


def test_a_seed_repeats_an_answer(client):
    def ask(seed):
        return client.completions.create(model="tiny-r1", prompt="Once", max_tokens=24, temperature=1.5,
                                         seed=seed)
    assert ask(3).choices[0].text == ask(3).choices[0].text
    assert len({ask(seed).choices[0].text for seed in range(4)}) > 1


def test_several_answers(client):
    answer = client.completions.create(model="tiny-r1", prompt=["a", "b"], n=2, max_tokens=2, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_logprobs(client):
    chat = client.chat.completions.create(model="tiny-r1", messages=QUESTION, max_tokens=4, temperature=0,
                                          logprobs=True, top_logprobs=3)
    for token in chat.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy: the likeliest
        assert bytes(token.bytes).decode(errors="replace") == token.token
    text = client.completions.create(model="tiny-r1", prompt="I am", max_tokens=4, temperature=0, logprobs=2,
                                     echo=True)
    logprobs = text.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])


def test_prompt_logprobs_do_not_depend_on_what_follows(client):
    def logprobs(prompt):
        answer = client.completions.create(model="tiny-r1", prompt=prompt, max_tokens=1, temperature=0,
                                           logprobs=0, echo=True)
        return answer.choices[0].logprobs.token_logprobs
    assert logprobs([40, 41, 42, 43])[:4] == logprobs([40, 41, 42, 43, 44])[:4]


def test_stop(client):
    ask = dict(model="tiny-r1", prompt="I am", max_tokens=32, temperature=0)
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[len(whole) // 2:len(whole) // 2 + 2]
    cut = client.completions.create(**ask, stop=[stop])
    assert cut.choices[0].text == whole[:whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop" and cut.choices[0].stop_reason == stop


@pytest.mark.parametrize("options, kind, fragment", [
    ({"model": "nothing"}, openai.NotFoundError, "The model `nothing` does not exist."),
    ({"temperature": -2}, openai.BadRequestError, "temperature must be non-negative, got -2.0."),
    ({"max_tokens": 10 ** 7}, openai.BadRequestError, "is too large"),
    ({"extra_body": {"guided_regex": "a"}}, openai.BadRequestError, "not supported by Tessera"),
])
def test_errors(client, options, kind, fragment):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "tiny-r1", "messages": QUESTION} | options)
    assert fragment in caught.value.message and caught.value.body["code"] == caught.value.status_code


def test_keys(guarded_server):
    def models(key):
        with openai.OpenAI(base_url=guarded_server.url("/v1"), api_key=key, max_retries=0) as one:
            return one.models.list().data
    assert len(models("secret")) == 1
    with pytest.raises(openai.AuthenticationError, match="Unauthorized"):
        models("wrong")
