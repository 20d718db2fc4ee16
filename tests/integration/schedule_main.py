"""The process behind `test_schedule`: asks three-key questions in every way, and prints how many answers are right."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from flashmemory_vllm.reference import reference_indexer_path, reference_model_path
from tests.e2e.questions import Question, make_questions

NUM_QUESTIONS = 3
NUM_TOKENS = 3009
CHUNK = 1024
LAST_CHUNKS = (1, 2, 17)
PREEMPTED_AFTER = (1, 6)


class Asker:
    """One engine, and the right answers that it gave to each way of asking."""

    def __init__(self) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(reference_model_path()),
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            kv_cache_memory_bytes=1 << 28,
            block_size=32,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=4,
            attention_backend="flashmemory",
            additional_config={
                "flashmemory": {
                    "resident_ratio": 0.135,
                    "min_sparse_tokens": 1024,
                    "host_memory_gib": 0.5,
                    "indexer": str(reference_indexer_path()),
                }
            },
        )
        self.right: dict[str, int] = {}

    def ask(self, way: str, questions: Sequence[Question], **sampling: Any) -> None:
        """Ask one after the other; several answers to a question are counted apart."""
        params = _params(**sampling)
        for question in questions:
            (asked,) = self.llm.generate([question.prompt], params, use_tqdm=False)
            for child, answer in enumerate(asked.outputs):
                self._count(way if params.n == 1 else f"{way} {child}", question, answer.text)

    def ask_and_preempt(self, way: str, questions: Sequence[Question], after: int) -> None:
        """Ask one after the other; each loses its blocks once it has said so many tokens."""
        engine = self.llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        for index, question in enumerate(questions):
            engine.add_request(f"{way} {index}", question.prompt, _params())
            was_preempted, text = False, ""
            while engine.has_unfinished_requests():
                for output in engine.step():
                    text, said = output.outputs[0].text, len(output.outputs[0].token_ids)
                    if said >= after and not was_preempted and not output.finished:
                        scheduler._preempt_request(scheduler.running.pop(), time.monotonic())
                        was_preempted = True
            assert was_preempted
            self._count(way, question, text)

    def _count(self, way: str, question: Question, answer: str) -> None:
        self.right[way] = self.right.get(way, 0) + (answer.strip() == question.answer)


def _params(**sampling: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, **sampling})


def main() -> None:
    """Ask, and print the result."""
    asker = Asker()
    questions = make_questions("multiquery", NUM_TOKENS, NUM_QUESTIONS, 100)
    asker.ask("first", questions)
    asker.ask("again", questions)
    asker.llm.reset_prefix_cache()
    asker.ask("child", questions, n=3, temperature=1.0, top_k=1)
    for after in PREEMPTED_AFTER:
        asker.ask_and_preempt(f"preempted after {after}", questions, after)
    for tokens in LAST_CHUNKS:
        asker.llm.reset_prefix_cache()
        asker.ask(f"last chunk {tokens}", make_questions("multiquery", 3 * CHUNK + tokens, NUM_QUESTIONS, 200))
    sys.stdout.write(f"\nright answers: {json.dumps(asker.right)}\n")


if __name__ == "__main__":
    main()
