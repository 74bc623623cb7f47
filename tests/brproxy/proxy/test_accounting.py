"""What a response means for the load of its request, without a response."""

from types import SimpleNamespace

from brproxy.engines.dialect import RequestFacts, make_dialect
from brproxy.estimate import TokenEstimator
from brproxy.proxy.accounting import NO_DATA, Account
from brproxy.proxy.sse import Unread

DELTA = b'data: {"type":"content_block_delta","delta":{"text":"x"}}\n\n'
TEXT = (90, 0, 0, 0, 0, 0, 0, 0)
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":" x"}}]}\n\n'


class FakeLease:
    """Notes what is booked."""

    def __init__(self):
        self.booked_tokens = 0
        self.prompts = []
        self.cached = []
        self.first_tokens = 0
        self.growth = []
        self.entry = SimpleNamespace(request=SimpleNamespace(prompt_tokens=1))

    def tokens(self, tokens):
        self.booked_tokens += tokens

    def correct_prompt(self, prompt_tokens):
        self.prompts.append(prompt_tokens)

    def correct_cached(self, cached_tokens):
        self.cached.append(cached_tokens)

    def first_token(self):
        self.first_tokens += 1

    def book_later(self, book):
        self.growth.append(book)

    def catch_up(self):
        growth, self.growth = self.growth, []
        for book in growth:
            book()
        return self.booked_tokens


def stream_account():
    lease, estimator = FakeLease(), TokenEstimator(4.0, 8)
    facts = RequestFacts("m", prompt_text=TEXT)
    account = Account(lease, make_dialect("openai"), facts, estimator, usage_was_added=False)
    account.expect_stream()
    return account, lease, estimator


def test_a_report_of_the_prompt_alone_takes_no_output_back():
    account, lease, _ = stream_account()
    account.look(
        b'data: {"type":"message_start","message":{"usage":{"input_tokens":9,"output_tokens":1}}}\n\n'
    )
    for _ in range(3):
        account.look(DELTA)
    account.look(b'data: {"type":"message_delta","usage":{"input_tokens":10}}\n\n')
    assert lease.prompts == [9, 10]
    assert lease.catch_up() == 1 + 3


def test_a_report_says_what_was_cached_of_the_prompt():
    account, lease, _ = stream_account()
    account.look(b'data: {"choices":[],"usage":{"prompt_tokens":30,"completion_tokens":0}}\n\n')
    assert lease.cached == []
    usage = b'{"prompt_tokens":30,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":16}}'
    account.look(b'data: {"choices":[],"usage":%b}\n\n' % usage)
    assert lease.cached == [16]


def test_a_report_replaces_what_was_counted_and_teaches_both():
    account, lease, estimator = stream_account()
    for _ in range(4):
        account.look(CHUNK)
    account.look(b'data: {"choices":[],"usage":{"prompt_tokens":30,"completion_tokens":12}}\n\n')
    assert lease.catch_up() == 12
    assert lease.first_tokens == 1
    account.look(CHUNK)
    assert lease.catch_up() == 13, "what comes behind the report is counted on top of it"
    account.learn()
    assert estimator.tokens_per_chunk("m") == 3, "of the four chunks that the report is about"
    assert estimator.prompt_tokens("m", "", TEXT) in {29, 30}


def test_a_growing_report_in_every_event_is_the_truth():
    account, lease, _ = stream_account()
    for tokens in (2, 4, 6):
        usage = b'"usage":{"prompt_tokens":3,"completion_tokens":%d}' % tokens
        account.look(b'data: {"choices":[{"index":0,"delta":{"content":" x"}}],%b}\n\n' % usage)
        assert lease.catch_up() == tokens


def test_reports_of_single_sequences_add_up():
    lease = FakeLease()
    facts = RequestFacts("m", prompt_text=TEXT, sequences=2)
    account = Account(lease, make_dialect("openai"), facts, TokenEstimator(4.0, 8), usage_was_added=False)
    account.expect_stream()
    event = b'data: {"text":"x","index":%d,"meta_info":{"prompt_tokens":3,"completion_tokens":%d}}\n\n'
    for sequence, tokens in ((0, 2), (1, 5), (0, 4), (1, 5)):
        account.look(event % (sequence, tokens))
    assert lease.catch_up() == 9
    assert not lease.prompts, "whether both have the same prompt is not said"


def test_a_prompt_that_is_not_all_text_teaches_nothing():
    lease, estimator = FakeLease(), TokenEstimator(4.0, 8)
    facts = RequestFacts("m", prompt_text=TEXT, teaches=False)
    account = Account(lease, make_dialect("openai"), facts, estimator, usage_was_added=False)
    account.reply(b'{"choices":[],"usage":{"prompt_tokens":30,"completion_tokens":7}}')
    account.learn()
    assert estimator.prompt_tokens("m", "", TEXT) == 23


def test_reports_teach_of_the_user_they_are_of():
    text, estimator = (2000, 0, 0, 0, 0, 0, 0, 0), TokenEstimator(4.0, 8)
    for user, tokens in (("terse", 400), ("dense", 600)) * 20:
        facts = RequestFacts("m", prompt_text=text, user=user)
        account = Account(FakeLease(), make_dialect("openai"), facts, estimator, usage_was_added=False)
        account.reply(b'{"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":7}}' % tokens)
        account.learn()
    assert estimator.prompt_tokens("m", "terse", text) < 430
    assert estimator.prompt_tokens("m", "dense", text) > 570


def test_an_event_without_data_says_nothing():
    account, lease, _ = stream_account()
    for event in (b": ping\n\n", b"event: x\n\n", Unread(CHUNK)):
        assert account.look(event) is NO_DATA
    assert (lease.catch_up(), lease.first_tokens) == (0, 0)


def test_a_reply_is_booked_as_it_reports():
    lease, estimator = FakeLease(), TokenEstimator(4.0, 8)
    facts = RequestFacts("m", prompt_text=TEXT)
    account = Account(lease, make_dialect("openai"), facts, estimator, usage_was_added=False)
    account.reply(b'{"choices":[],"usage":{"prompt_tokens":30,"completion_tokens":7}}')
    account.learn()
    assert lease.booked_tokens == 7
    assert estimator.tokens_per_chunk("m") == 1, "no chunks were seen"


def test_the_pattern_of_plain_events_follows_the_stream_but_not_its_last_event():
    account, _, _ = stream_account()
    thinking = CHUNK.replace(b"content", b"reasoning")
    last = CHUNK.replace(b"}]}", b'},"finish_reason":"length"]}')
    account.look(thinking)
    assert account.plain.matches(thinking)
    account.look(CHUNK)
    assert account.plain.matches(thinking), "once is no change"
    account.look(CHUNK)
    assert account.plain.matches(CHUNK)
    account.look(last)
    assert account.plain.matches(CHUNK)
