"""A trace is played at the same steps each time; who gets nothing is noticed; an idle engine is measured."""

from itertools import count

from flashmemory_vllm.soak.drive import Driver, Outcome, Text
from flashmemory_vllm.soak.trace import Trace
from tests.unit.soak.fake_engine import FakeEngine, right_token
from tests.unit.soak.traces import trace


def _play(played: Trace, engine: FakeEngine, seconds: float | None = None) -> tuple[Outcome, list[Text]]:
    texts: list[Text] = []
    ticks = count()
    return Driver(played, engine, texts.append, seconds, clock=lambda: float(next(ticks))).run(), texts


def test_every_request_ends_and_every_answer_is_kept_whole() -> None:
    played, engine = trace(), FakeEngine()
    outcome, texts = _play(played, engine)
    assert engine.added == [request.name for request in played.requests]
    assert outcome.added == 60 == outcome.finished + outcome.aborted
    assert outcome.aborted == len(engine.aborted) > 0
    assert outcome.hanging == []
    finished = [request for request in played.requests if request.name not in engine.aborted]
    assert len(texts) == sum(request.num_answers for request in finished)
    for request in finished:
        prompt = played.prompt(request)
        right = tuple(right_token(prompt, place) for place in range(request.max_tokens))
        places = {text.place for text in texts if text.name == request.name and text.token_ids == right}
        assert places == set(range(request.num_answers))
    assert outcome.peaks["running"] > 0
    assert outcome.measured == [{"rss_mib": 1.0}] * 5


def test_a_replay_is_the_same() -> None:
    first, second = FakeEngine(), FakeEngine()
    assert _play(trace(), first) == _play(trace(), second)
    assert first.num_steps == second.num_steps


def test_no_more_than_so_many_are_open() -> None:
    engine = FakeEngine()
    _play(trace(max_open=3, gap_steps=0.1), engine)
    assert engine.most_running == 3


def test_a_request_without_tokens_hangs_and_does_not_hold_up_the_end() -> None:
    played = trace()
    silent = next(request.name for request in played.requests if request.abort_after_steps is None)
    slow = trace(patience_steps=50)
    outcome, texts = _play(slow, engine := FakeEngine([silent]))
    assert outcome.hanging == [silent]
    assert silent in engine.aborted
    assert silent not in {text.name for text in texts}
    assert outcome.added == outcome.finished + outcome.aborted + 1


def test_after_its_time_no_request_arrives_and_those_there_are_finish() -> None:
    outcome, _ = _play(trace(share_aborted=0.0), FakeEngine(), seconds=20)
    assert 0 < outcome.added < 60
    assert outcome.finished == outcome.added
