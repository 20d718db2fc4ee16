"""Attention computes a batch at once, or in runs of neighbouring tokens: decode rows first, then those in prefill."""


def within_run(tokens: slice, first_token: int, num_tokens: int) -> slice | None:
    """Where tokens of a batch lie in a run of it; None if they do not. A row lies in one run.

    Args:
        tokens: first and last of them, counted in the batch.
        first_token: where the run begins.
        num_tokens: of the run.
    """
    if not first_token <= tokens.start < first_token + num_tokens:
        return None
    return slice(tokens.start - first_token, tokens.stop - first_token)
