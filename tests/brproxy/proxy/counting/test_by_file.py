"""Prompts counted by a model's tokenizer, from a file."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from brproxy.app import running_proxy
from brproxy.config import parse_config
from brproxy.types import InvalidInputError
from brproxy.validation import ConfigError
from tests.brproxy.proxy.counting.conftest import CHAT, TEXT, WORDS, prompts


@pytest.fixture
def tokenizer(tmp_path):
    """Return the file of a tokenizer that makes a token of each word, and puts one in front of a text."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<s>": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return {"exact": "file", "tokenizer": str(file), "timeout_s": 600}


@pytest.mark.parametrize(("more", "tokens"), [({}, 8), ({"add_special_tokens": False}, 7)])
async def test_a_text_is_counted_by_a_file(engine, start, ask, until, tokenizer, more, tokens):
    engine.answers.clear()
    proxy = await start(tokenizer)
    task = ask(proxy, **more)
    await until(lambda: proxy.ledger.kv_tokens == (tokens,))
    engine.answers.set()
    assert await task == 200
    assert engine.asked == []


async def test_a_chat_s_text_is_counted_and_its_template_estimated(engine, start, ask, until, tokenizer):
    engine.answers.clear()
    proxy = await start(tokenizer)
    estimator = proxy.running.service.estimator
    messages = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "eight"}]
    task = ask(proxy, path=CHAT, messages=messages)
    # Words of both, their roles, and what stands around two messages.
    counted = 7 + 1 + 2 + estimator.template_tokens("m", (0, 0, 0, 0, 0, 0, 2, 1))
    await until(lambda: proxy.ledger.kv_tokens == (counted,))
    assert estimator.prompt_tokens("m", "", (40, 0, 0, 0, 0, 0, 2, 1)) == estimator.prompt_tokens(
        "other", "", (40, 0, 0, 0, 0, 0, 2, 1)
    ), "what is partly an estimate teaches nothing"
    engine.answers.set()
    assert await task == 200


@pytest.mark.parametrize("model", ["m", "other"])
async def test_a_file_is_of_one_model_if_it_says_so(engine, start, ask, until, tokenizer, model):
    proxy = await start(tokenizer | {"tokenizer_model": model})
    assert await ask(proxy) == 200
    await until(lambda: prompts(proxy)["answered"] == (model == "m"))
    assert prompts(proxy)["asked"] == (model == "m")


async def test_halves_of_characters_are_left_to_the_engine(engine, start, client, until, tokenizer, caplog):
    proxy = await start(tokenizer)
    body = b'{"model": "m", "prompt": "a \\ud800 b"}'
    async with client.post(proxy.url + TEXT, data=body, headers={"Content-Type": "application/json"}) as got:
        assert got.status == 200
    await until(lambda: prompts(proxy)["dropped"] == 1)
    assert not caplog.records


async def test_a_file_that_cannot_be_read_is_said_at_start(tmp_path):
    document = {
        "listen": {"port": 0},
        "worker": [{"url": "http://127.0.0.1:1"}],
        "prompts": {"exact": "file", "tokenizer": str(tmp_path / "none.json")},
    }
    with pytest.raises(InvalidInputError, match=r"none\.json is no tokenizer\.json that can be read"):
        async with running_proxy(parse_config(document, "test")):
            pass


def test_a_file_must_be_named():
    document = {"worker": [{"url": "http://127.0.0.1:1"}], "prompts": {"exact": "file"}}
    with pytest.raises(ConfigError, match="needs tokenizer, which is not given"):
        parse_config(document, "test")
