"""Questions whose answers a sparse set of blocks can hold, as text."""

from dataclasses import dataclass

from flashmemory_vllm.evaluation.tasks import TaskName, iter_samples
from flashmemory_vllm.evaluation.vocabulary import decode

BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with its only right answer.

    Attributes:
        prompt: text of the whole prompt; the tokenizer or the chat template adds the special tokens.
        answer: the right answer.
        num_tokens: tokens of the prompt, special ones included.
    """

    prompt: str
    answer: str
    num_tokens: int


def make_questions(task: TaskName, num_tokens: int, count: int, seed: int, *, chat: bool = False) -> list[Question]:
    """Questions of different contexts, the facts they ask for in one block each.

    A fact that lies across two blocks is found only if the selector takes both, which is a matter of accuracy; here
    the server is tested.

    Args:
        task: which task.
        num_tokens: tokens of each prompt.
        count: how many.
        seed: seed of the first context.
        chat: leave out what the chat template adds.
    """
    found: list[Question] = []
    while len(found) < count:
        ((sample,),) = iter_samples(task, num_tokens, 1, seed, chat=chat)
        seed += 1
        if all(start // BLOCK_SIZE == (stop - 1) // BLOCK_SIZE for start, stop in sample.needle_spans):
            ids = [int(token) for token in sample.prompt_ids]
            answer = decode([int(token) for token in sample.answer_ids[:-1]])
            found.append(Question(decode(ids[2:-1] if chat else ids[1:]), answer, num_tokens))
    return found
