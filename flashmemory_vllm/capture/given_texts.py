"""Windows of texts of one's own: what a model is recorded along, in place of answers of its own."""

from collections.abc import Sequence

from flashmemory_vllm.capture.prompts import Encoder, Prompt
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.texts import common_start, windows_by_text

# Shares of the longest prompt that prompts have in turn
LENGTH_SHARES = (1.0, 0.5)


def given_prompts(
    texts: Sequence[str], encoder: Encoder, num_documents: int, num_tokens: int, num_forced: int
) -> list[Prompt]:
    """Windows that do not overlap, evenly over all texts, as many as there are: prompts and the text that goes on.

    Args:
        texts: documents; windows of one are of one group.
        encoder: the model's tokenizer.
        num_documents: prompts at most.
        num_tokens: tokens of the longest prompts; every second one has half of them.
        num_forced: tokens that follow each, along which the model is recorded.

    Raises:
        ConfigError: no text is long enough.
    """
    length = num_tokens + num_forced
    found = [
        (group, window)
        for group, of_one in enumerate(windows_by_text(texts, encoder.text, length))
        for window in of_one
    ]
    if not found:
        raise ConfigError(
            f"--texts: no document has {length:,} tokens; allowed are longer ones, or less of --tokens and "
            "--max-output-tokens"
        )
    count = min(num_documents, len(found))
    head = common_start(encoder.text("a"), encoder.text("b"))
    prompts = []
    for index in range(count):
        group, window = found[index * len(found) // count]
        kept = int(num_tokens * LENGTH_SHARES[index % len(LENGTH_SHARES)])
        prompt = head + window[num_tokens - kept + len(head) : num_tokens]
        prompts.append(Prompt(tuple(prompt), num_forced, group, forced=tuple(window[num_tokens:])))
    return prompts
