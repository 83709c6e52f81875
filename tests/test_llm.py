"""The client for any language model: backends against each other, closed forms, faults of a server."""

import pytest
from readrun.llm import LLMError, Reply, ScriptedLLM, Usage


def test_script_in_order_with_stop_usage_and_its_end():
    llm = ScriptedLLM(["one two STOP three", Reply("given", usage=Usage(0, 7)), LLMError("down")])
    first, second = llm.generate([{"role": "user", "content": "say it now"}], n=2, stop="STOP")
    assert (first.text, first.usage, first.logprobs) == ("one two ", Usage(3, 2), None)
    assert second.text == "given" and llm.usage == Usage(3, 9)
    (error,) = llm.generate_batch(["again"], return_errors=True)
    assert isinstance(error, LLMError) and str(error) == "down"
    with pytest.raises(LLMError, match="no reply left for: 'more'"):
        llm.generate("more")


def test_script_of_a_function_sees_messages_and_scores():
    llm = ScriptedLLM(lambda messages: messages[-1]["content"].upper(), lambda _, text: -float(len(text)))
    assert [r.text for (r,) in llm.generate_batch(["a", "b"])] == ["A", "B"]
    assert llm.loglik("x", ["ab", "abc"]) == [-2.0, -3.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(messages=[]), "messages: the conversation is empty"),
        (dict(messages=[{"role": "user"}]), "messages: number 0"),
        (dict(messages=[{"role": "robot", "content": "x"}]), "role 'robot'; accepted: system, user"),
        (dict(messages="x", n=0), "n: 0; accepted: 1"),
        (dict(messages="x", max_tokens=0), "max_tokens: 0"),
        (dict(messages="x", temperature=-1.0), "temperature: -1.0"),
        (dict(messages="x", temperature=float("nan")), "temperature: nan"),
        (dict(messages="x", stop=[""]), "stop"),
    ],
)
def test_bad_calls_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        ScriptedLLM(["never"]).generate(**call)


def test_what_a_backend_cannot_do_is_said():
    with pytest.raises(LLMError, match="scripted gives no log-likelihoods"):
        ScriptedLLM([]).loglik("x", ["y"])
