"""Quality of a selection: by hand on a small document, and the oracle is the best there is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flashmemory_vllm.indexer.neural_model import NeuralIndexer
from flashmemory_vllm.training.baselines import baseline_scorer
from flashmemory_vllm.training.batches import Sampling, TrainingSteps
from flashmemory_vllm.training.dataset import Schedule, TrainingData
from flashmemory_vllm.training.evaluation import (
    IndexerScorer,
    Paid,
    Question,
    ask,
    choose,
    evaluate,
    judge,
)
from flashmemory_vllm.training.frame import MAIN_RATIO, frame_of
from flashmemory_vllm.training.processes import Processes
from flashmemory_vllm.training.selections import Selections
from flashmemory_vllm.training.settings import TrainSettings, make_spec
from flashmemory_vllm.training.validation import Validation
from tests.unit.training.recordings import Toy, write_recordings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder: Path = tmp_path_factory.mktemp("data")
    write_recordings(folder, Toy(documents=4, tokens=24))
    return TrainingData(folder)


def test_a_selection_is_judged_by_what_it_keeps(data: TrainingData) -> None:
    document = data.load(0)
    # 1601 tokens: of 101 blocks 13 are kept, 4 of the sink and 3 recent ones among them
    mass = np.zeros(100, np.float32)
    mass[[0, 40, 50]] = [0.5, 0.25, 0.25]
    # Of three tokens one pays to what is left out, one to a block of the set alone, one to nothing
    paid = [([40, 50], [0.2, 0.6]), ([40], [0.9]), ([], [])]
    rows = [(np.array(ids, np.int64), np.array(shares, np.float32)) for ids, shares in paid]
    question = Question(0, 100, 1601, shares=mass**0.25, mass=mass, paid=Paid.by(rows))
    frame, budget = frame_of(question.num_tokens, document.block_size, MAIN_RATIO)
    assert (frame.sink_end, frame.recent_start, budget) == (4, 98, 13)
    scores = np.zeros(100, np.float32)
    scores[40:46] = 1
    kept = choose(document, question, scores, MAIN_RATIO)
    before = np.zeros(101, np.bool_)
    before[[0, 1, 2, 3, 40, 41, 98, 99, 100]] = True
    assert judge(question, kept, before) == pytest.approx((0.75, 0.75, 0.2, 4))
    assert np.isnan(judge(question, kept, None).fetched)


def test_attention_to_newer_blocks_is_never_missed(data: TrainingData) -> None:
    mass = np.zeros(103, np.float32)
    mass[[60, 102]] = [0.25, 0.75]
    question = Question(0, 100, 1601, shares=mass[:100], mass=mass, paid=Paid.by([]))
    kept = choose(data.load(0), question, -np.arange(100, dtype=np.float32), MAIN_RATIO)
    assert judge(question, kept, None)[:2] == (0, 0.75)


def test_the_oracle_is_the_best_and_random_is_not_good(data: TrainingData) -> None:
    validation = Validation(data, range(4), Schedule(tau=2, delay=1), limit=12)
    scores = {
        name: Processes().mean(columns) for name, columns in validation.run_baselines(torch.device("cpu")).items()
    }
    for key in (key for key in scores["oracle"] if not key.startswith("fetched")):
        best = min if key.startswith("lost") else max
        assert scores["oracle"][key] == best(values[key] for values in scores.values())
    assert scores["oracle"]["mass@0.135"] > 0.99
    assert scores["random"]["mass@0.135"] < 0.6
    assert len(validation) == 4 * 11


def test_questions_are_asked_when_serving_would_select(data: TrainingData) -> None:
    document = data.load(1)

    def asked(limit: int, tau: int, opening_steps: int = 0) -> list[int]:
        return [question.token for question in ask(document, Schedule(tau, 1, opening_steps), limit)]

    assert asked(9, tau=4) == [0, 4, 8, 12, 16, 20]
    assert asked(2, tau=4) == [0, 4]
    assert asked(2, tau=64) == [0]
    assert asked(9, tau=8, opening_steps=2) == [0, 1, 2, 8, 16]


def test_a_document_is_scored_as_the_model_does(data: TrainingData) -> None:
    model = NeuralIndexer(make_spec(data, TrainSettings(rank=16, heads=4, dim=32, decays=()))).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.distance)
    # Where there is no block before, the module repeats the first chunk, which a positive offset would lift
    torch.nn.init.uniform_(model.reach_offset, -1, 0)
    document, window = data.load(0), model.spec.query_window
    blocks = torch.arange(document.num_candidates(0))
    queries = torch.cat((document.question(window), document.queries[3:4])).unsqueeze(0)
    distance = (len(blocks) - blocks.float()) * document.chunks_per_block
    with torch.no_grad():
        pooled = document.chunks(blocks, model.spec.reach).unsqueeze(0)
        logits = model(queries, pooled, distance.expand(1, window + 1, -1)).amax(2)[0]
    scorer = IndexerScorer(model, document)
    asked = logits[:window].amax(0)
    torch.testing.assert_close(scorer(0), asked, rtol=1e-3, atol=1e-4)
    # What the question asked for is not forgotten, nor where it stands
    later = torch.maximum(asked, logits[window])
    later[document.question_blocks(window)] = torch.inf
    torch.testing.assert_close(scorer(3), later, rtol=1e-3, atol=1e-4)


def test_a_document_is_forecast_as_it_is_in_training(data: TrainingData) -> None:
    settings = TrainSettings(rank=16, heads=4, dim=32, decays=(0.0, 0.9), query_window=3)
    model = NeuralIndexer(make_spec(data, settings)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    assert model.head is not None
    torch.nn.init.normal_(model.head.out)
    schedule = Schedule(tau=4, delay=1, opening_steps=2)
    sampling = Sampling(1, 2, 3, model.spec.reach, schedule, settings.decays, seed=0)
    steps = TrainingSteps(data, [2], sampling)
    batch, document = steps[0], data.load(2)
    with torch.no_grad():
        logits = Selections(model)(batch).forecast
    assert logits is not None
    scorer = IndexerScorer(model, document)
    blocks = document.num_candidates(0) - batch.distance[0, 0].long() // document.chunks_per_block
    for selection, token in enumerate((0, 1, 2)):
        is_asked = batch.weights[0, selection] > 0
        scores = scorer(token)[blocks[is_asked]]
        torch.testing.assert_close(scores, logits[0, selection, is_asked], rtol=1e-3, atol=1e-3)
    whole, content = scorer.both(1)
    assert torch.equal(whole, scorer(1))
    assert not torch.allclose(content[4:90], whole[4:90])
    model.head = None
    assert torch.equal(content, IndexerScorer(model, document)(1))


def test_last_and_mix_score_what_anchor_layers_paid(data: TrainingData) -> None:
    document, questions = data.load(0), ask(data.load(0), Schedule(4, 1), 9)
    paid = document.anchor_share[len(document.prompt_queries) :].float()
    last, mix = (baseline_scorer(name, document, data.meta, questions, torch.device("cpu")) for name in ("last", "mix"))
    assert torch.equal(last(5), paid[5, : document.num_candidates(5)])
    (block,) = paid[5].nonzero()[:, 0].tolist()
    assert float(mix(5)[block]) == pytest.approx(float(paid[5, block]), rel=1e-3)
    assert float(mix(5)[block + 1]) >= 0.5 * float(mix(5)[block])
    # What was looked at earlier is not forgotten
    earlier = document.memory(4, (0.9,))[5, 0] > 0
    assert earlier.sum() > 1
    assert (mix(5)[earlier[: len(mix(5))]] > 0).all()


def test_what_is_held_gives_way_to_what_is_much_better_only(data: TrainingData) -> None:
    document = data.load(0)
    questions = ask(document, Schedule(4, 1), 9)
    low, high = torch.zeros(102), torch.zeros(102)
    low[10:16] = high[10:16] = 1.0
    high[20:26] = 1.5

    def scorer(token: int) -> torch.Tensor:
        return (high if token >= 8 else low)[: document.num_candidates(token)]

    assert [quality.fetched for _, quality in evaluate(document, questions, scorer, [MAIN_RATIO])][2] == 6
    held = evaluate(document, questions, scorer, [MAIN_RATIO], hysteresis=1.0)
    assert [quality.fetched for _, quality in held][2] == 0
