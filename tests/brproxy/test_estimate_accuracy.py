"""How well prompts are estimated, against tokenizers that are known, and against one ratio for all."""

import random
import re
from dataclasses import dataclass

import pytest

from brproxy.engines.prompt import prompt_size
from brproxy.estimate import LearntRatio, RatioLimits, TokenEstimator

PIECES = re.compile(r"[a-zA-Z]+|[0-9]+| {2,}| |[^\x00-\x7f]|.", re.DOTALL)


@dataclass(frozen=True)
class Tokenizer:
    """Makes a token of so many letters and digits at most, and so many of a Chinese character."""

    letters: int
    digits: int
    chinese: float
    message: int = 4
    chat: int = 0

    def count(self, messages):
        """Return the tokens of a chat."""
        return self.chat + sum(self.message + self.count_text(message["content"]) for message in messages)

    def count_text(self, text):
        tokens = 0.0
        for piece in PIECES.findall(text):
            if piece.isascii() and piece.isalpha():
                tokens += -(-len(piece) // self.letters)
            elif piece.isascii() and piece.isdigit():
                tokens += -(-len(piece) // self.digits)
            elif not piece.isascii():
                tokens += self.chinese
            elif piece != " ":
                tokens += 1
        return round(tokens)


TOKENIZERS = [
    Tokenizer(letters=6, digits=3, chinese=0.7),
    Tokenizer(letters=5, digits=1, chinese=0.6),
    Tokenizer(letters=4, digits=2, chinese=0.95),
    Tokenizer(letters=6, digits=1, chinese=0.8, message=5, chat=60),
]

ENGLISH = [
    *("the", "of", "and", "to", "in", "that", "is", "it", "was", "for", "on", "with", "as", "his", "they"),
    *("at", "be", "this", "have", "from", "or", "one", "had", "by", "word", "but", "not", "what", "all"),
    *("were", "we", "when", "your", "can", "said", "there", "use", "an", "each", "which", "she", "do"),
    *("how", "their", "if", "will", "up", "other", "about", "out", "many", "then", "them", "these", "so"),
    *("some", "her", "would", "make", "like", "him", "into", "time", "has", "look", "two", "more"),
    *("write", "go", "see", "number", "no", "way", "could", "people", "my", "than", "first", "water"),
    *("been", "call", "who", "oil", "its", "now", "find", "long", "down", "day", "did", "get", "come"),
    *("made", "may", "government", "international", "understanding", "development", "information"),
    *("particularly", "responsibility", "available"),
]
NAMES = [
    "self",
    "value",
    "request",
    "index",
    "parse_config",
    "x",
    "i",
    "MAX_ROWS",
    "_lock",
    "encode",
    "items",
]


def english(rng, length):
    words = rng.choices(ENGLISH, k=length // 5)
    ends = rng.choices([" ", " ", " ", " ", " ", ", ", ". "], k=len(words))
    return "".join(word + end for word, end in zip(words, ends, strict=True))


def code(rng, length):
    lines = []
    for _ in range(length // 34):
        one, other = rng.choices(NAMES, k=2)
        indent = " " * rng.choice([0, 4, 8])
        lines.append(f"{indent}{one}.{other}({rng.randrange(2000)}, '{rng.choice(ENGLISH)}') == [{one}]\n")
    return "".join(lines)


def chinese(rng, length):
    characters = (chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(length // 3))
    return "".join(
        character + rng.choice(["", "", "", "", "", "\N{FULLWIDTH COMMA}", "。"]) for character in characters
    )


def mixed(rng, length):
    return "".join(rng.choice([english, code, chinese])(rng, length // 4) for _ in range(4))


def requests(kind, seed):
    """Yield chats of one kind, of very different lengths."""
    rng = random.Random(seed)
    while True:
        lengths = [min(int(rng.lognormvariate(6.5, 1.0)) + 120, 20_000) for _ in range(rng.choice([1, 1, 3]))]
        yield [{"role": "user", "content": kind(rng, length)} for length in lengths]


class OneRatio:
    """What there was before: bytes for each token, of a model."""

    def __init__(self):
        self.ratio = LearntRatio(RatioLimits(4.0, 0.5, 16.0), 8)

    def prompt_tokens(self, model, user, text):
        return sum(text[:-2]) / self.ratio.value(model)

    def learn_prompt(self, model, user, text, tokens):
        self.ratio.learn(model, sum(text[:-2]), tokens)


def errors(estimator, tokenizer, kind, number, *, user="", seed=0):
    """Return the relative error of all estimates together, after each of so many requests."""
    estimated = true = 0
    after = []
    for _, messages in zip(range(number), requests(kind, seed), strict=False):
        text = prompt_size({"messages": messages}).text
        tokens = tokenizer.count(messages)
        estimated += estimator.prompt_tokens("m", user, text)
        true += tokens
        estimator.learn_prompt("m", user, text, tokens)
        after.append(estimated / true - 1)
    return after


def each_tokenizer(test):
    test = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=repr)(test)
    return pytest.mark.parametrize("seed", [1, 2, 3])(test)


@each_tokenizer
@pytest.mark.parametrize("kind", [english, code, chinese, mixed])
def test_steady_traffic(kind, tokenizer, seed):
    estimator = TokenEstimator(4.0, 8)
    first = errors(estimator, tokenizer, kind, 20, seed=seed)
    assert abs(first[-1]) <= 0.08, "the first reports that there are among them"
    assert abs(errors(estimator, tokenizer, kind, 20, seed=seed + 10)[-1]) <= 0.05


@each_tokenizer
def test_chinese_right_after_english(tokenizer, seed):
    estimator = TokenEstimator(4.0, 8)
    errors(estimator, tokenizer, english, 40, seed=seed)
    first = errors(estimator, tokenizer, chinese, 5, seed=seed)
    assert abs(first[0]) <= 0.25
    assert abs(errors(estimator, tokenizer, chinese, 5, seed=seed + 10)[-1]) <= 0.08


@each_tokenizer
def test_code_right_after_english_and_back(tokenizer, seed):
    estimator, ratio = TokenEstimator(4.0, 8), OneRatio()
    for each in (estimator, ratio):
        errors(each, tokenizer, english, 40, seed=seed)
        errors(each, tokenizer, code, 5, seed=seed)
    assert abs(errors(estimator, tokenizer, code, 5, seed=seed + 10)[-1]) <= 0.05
    assert abs(errors(ratio, tokenizer, code, 5, seed=seed + 10)[-1]) > 0.2, "what one ratio for all does"
    for each in (estimator, ratio):
        errors(each, tokenizer, english, 5, seed=seed + 20)
    assert abs(errors(estimator, tokenizer, english, 5, seed=seed + 30)[-1]) <= 0.08
    assert abs(errors(ratio, tokenizer, english, 5, seed=seed + 30)[-1]) > 0.08


@each_tokenizer
def test_nothing_is_forgotten_meanwhile(tokenizer, seed):
    estimator = TokenEstimator(4.0, 8)
    for kind in (english, code, chinese):
        errors(estimator, tokenizer, kind, 30, seed=seed)
    for kind in (english, code, chinese, mixed):
        assert abs(errors(estimator, tokenizer, kind, 5, seed=seed + 10)[-1]) <= 0.1


@each_tokenizer
def test_users_side_by_side(tokenizer, seed):
    estimator = TokenEstimator(4.0, 8)
    for number in range(3):
        last = [
            errors(estimator, tokenizer, kind, 5, user=kind.__name__, seed=seed + 10 * number)[-1]
            for kind in (english, code, chinese, mixed)
        ]
    assert max(map(abs, last)) <= 0.08
