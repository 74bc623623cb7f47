"""What a step of workers that only prefill costs, from the waves that went there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.lifecycle import Event
from brproxy.prefill_pace import WAVES_MAX, WAVES_MIN, PrefillPace
from brproxy.step_costs import BASE_TOKENS
from brproxy.step_model import GivenCosts
from brproxy.types import PendingRequest, WorkerIndex
from tests.brproxy.test_dispatcher import dispatcher_of
from tests.draws import draws

NOTHING = GivenCosts()


class Group:
    """Two workers that prefill in waves, each of which is over when it says."""

    def __init__(self, given=NOTHING):
        self.dispatcher = dispatcher_of(slots=(99, 99))
        self.pace = PrefillPace(given)
        self.dispatcher.happenings.tell(self.pace)
        self.now_s = 0.0

    def send(self, *prompts):
        """Bind prompts, one after another to either worker, and return them."""
        wave = []
        for i, tokens in enumerate(prompts):
            request_id = self.dispatcher.arrive(PendingRequest(tokens), self.now_s)
            self.dispatcher.bind(request_id, WorkerIndex(i % 2), self.now_s)
            wave.append(request_id)
        return wave

    def over(self, wave, seconds):
        self.now_s += seconds
        for request_id in wave:
            self.dispatcher.ledger.first_token(request_id, self.now_s)

    def learnt(self, waves, seconds, begins_with=99):
        for prompts in waves:
            wave = self.send(*prompts)
            # What has come when a step begins, and then the rest.
            for first, last in ((0, begins_with), (begins_with, None)):
                if wave[first:last]:
                    self.over(wave[first:last], seconds(prompts[first:last]))
            self.now_s += 0.01
        # What is over is seen when the next comes.
        self.send(1)
        return self.pace.costs()


def most(prompts):
    return max(sum(prompts[::2]), sum(prompts[1::2]))


waves = st.lists(
    st.lists(st.integers(100, 9000), min_size=1, max_size=5), min_size=WAVES_MIN, max_size=WAVES_MAX
)


@draws(50)
@given(waves=waves, s_per_token=st.sampled_from([10e-6, 200e-6]), torn=st.sampled_from([99, 2, 4]))
def test_the_cost_of_a_token_is_learnt_also_where_all_waves_are_torn(waves, s_per_token, torn):
    costs = Group().learnt(waves, lambda prompts: (BASE_TOKENS + most(prompts)) * s_per_token, torn)
    assert costs.s_per_prefill_token == pytest.approx(s_per_token)
    assert costs.base_s == pytest.approx(BASE_TOKENS * s_per_token)


@given(waves=waves)
def test_what_is_given_is_taken_and_the_rest_learnt(waves):
    found = Group(GivenCosts(base_s=0.05)).learnt(waves, lambda prompts: 0.05 + 1e-4 * most(prompts))
    assert found[:3] == (0.05, 0.0, pytest.approx(1e-4))
    found = Group(GivenCosts(0.05, None, 2e-5)).learnt(waves, most)
    assert found[:3] == (0.05, 0.0, 2e-5)


def test_nothing_is_said_before_enough_is_known_but_what_is_given():
    group = Group(GivenCosts(prefill_tokens_max=2048))
    costs = group.learnt([[1000]] * (WAVES_MIN - 1), lambda _: 0.1)
    assert (costs.s_per_prefill_token, costs.prefill_tokens_max) == (0.0, 2048)
    group.over(group.send(1000), 0.1)
    group.send(1)
    assert group.pace.costs().s_per_prefill_token == 0.0, "one that is not over goes before it"
    assert Group().pace.costs().prefill_tokens_max is None


def test_a_wave_that_is_sent_ahead_begins_when_the_one_before_is_over():
    group = Group()
    before = group.send(1488)
    for _ in range(WAVES_MIN):
        # Sent when half of the step is left.
        group.now_s += 0.1
        after = group.send(1488)
        group.over(before, 0.1)
        before = after
    group.over(before, 0.2)
    group.send(1)
    assert group.pace.costs().s_per_prefill_token == pytest.approx(0.2 / 2000)


@pytest.mark.parametrize("event", [Event.CANCEL, Event.FAIL, None])
def test_what_is_lost_teaches_nothing(event):
    group = Group()
    for _ in range(WAVES_MIN + 4):
        lost, other = group.send(700, 1000)
        if event is None:
            group.dispatcher.retry(lost, group.now_s)
            group.now_s += 5.0
            group.dispatcher.bind(lost, WorkerIndex(1), group.now_s)
            group.over([lost, other], 50.0)
        else:
            group.dispatcher.end(lost, event)
            group.over([other], 50.0)
        group.now_s += 1.0
    known = group.pace.costs().s_per_prefill_token
    # Of one that was retried the wave that it went with then is one.
    assert known == 0.0 if event else known == pytest.approx(50.0 / (512 + 700))


def test_who_is_never_heard_of_again_holds_nothing_up_for_ever():
    group = Group()
    group.send(9)
    group.now_s += 1.0
    costs = group.learnt([[1488]] * (WAVES_MIN + 40), lambda _: 0.2)
    assert costs.s_per_prefill_token == pytest.approx(0.2 / 2000, rel=0.1)
