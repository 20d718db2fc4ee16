"""A request that names its own continuation decodes along it; its raw log-probabilities then tell what the text costs.

    vllm serve MODEL --logits-processors flashmemory_vllm.plugin.forced_tokens:ForcedTokens

and in the request `"vllm_xargs": {"forced_token_ids": [...]}`. vLLM reads raw log-probabilities before any processor
runs, so those of the forced tokens are the model's own. A processor cannot refuse a request for what only the model
tells: from a token on that the model does not have, the request samples freely, as it does behind its last one.
"""

from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

ARGUMENT = "forced_token_ids"


class ForcedTokens(V1LogitsProcessor, V2LogitsProcessor):
    """Leaves a request one token to sample, the next of its `forced_token_ids`; after the last it samples freely.

    One class for both model runners of vLLM: the server's option names a class before a runner is chosen.

    Args:
        vllm_config: the engine's; of its model the vocabulary and the longest request.
        runner: of V1 the device and whether memory is pinned, of V2 its `LogitsProcRequestState`.
    """

    def __init__(self, vllm_config: "VllmConfig", *runner: Any) -> None:
        model = vllm_config.model_config
        # A token that there is none of would be written behind the logits: the end of the engine for everybody
        self._vocabulary, self._longest = model.get_vocab_size(), model.max_model_len
        # V1: batch row -> forced ids and the ids generated so far, a list that vLLM goes on with
        self._rows: dict[int, tuple[list[int], list[int]]] = {}
        # V2: by request slot, on the device
        if len(runner) == 1:
            self._states = runner[0]
            self._lengths = torch.zeros(self._states.max_num_reqs, dtype=torch.int64, device=self._states.device)
            self._tokens = torch.zeros(self._states.max_num_reqs, 0, dtype=torch.int64, device=self._states.device)

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse the request unless its argument is a list of token ids.

        Raises:
            ValueError: it is something else.
        """
        given = (sampling_params.extra_args or {}).get(ARGUMENT)
        if given is not None and not _is_token_list(given):
            raise ValueError(f"{ARGUMENT}: {given!r} given, allowed: a list of token ids, integers from 0 up")

    def is_argmax_invariant(self) -> bool:
        """No: the forced token is seldom the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: follow the rows of the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, generated in batch_update.added:
            forced = self._forced(params)
            self._rows.pop(row, None)
            if forced:
                self._rows[row] = (forced, generated)
        for source, target, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = displaced

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """V2: take over a slot."""
        forced = self._forced(sampling_params)
        self._lengths[req_idx] = len(forced)
        if len(forced) > self._tokens.shape[1]:
            wider = self._tokens.new_zeros(len(self._tokens), len(forced))
            wider[:, : self._tokens.shape[1]] = self._tokens
            self._tokens = wider
        self._tokens[req_idx, : len(forced)] = torch.tensor(forced, dtype=torch.int64, device=self._tokens.device)
        return bool(forced)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Force the next token of each row that has one.

        Args:
            logits: float32 [R, vocabulary], changed in place.
            ctx: V2's rows and positions; None under V1.
        """
        if ctx is not None:
            return self._apply_by_position(logits, ctx)
        for row, (forced, generated) in self._rows.items():
            if len(generated) < len(forced):
                logits[row] = -torch.inf
                logits[row, forced[len(generated)]] = 0.0
        return logits

    def _apply_by_position(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """All rows at once, without asking the device anything: asynchronous scheduling runs ahead of the host."""
        if not self._tokens.shape[1]:
            return logits
        slots = ctx.expanded_idx_mapping.long()
        # The row at position p writes the token at p + 1
        place = ctx.pos + 1 - self._states.prompt_len.gpu[slots]
        is_forced = (place >= 0) & (place < self._lengths[slots])
        tokens = self._tokens[slots, place.clamp(0, self._tokens.shape[1] - 1)].unsqueeze(1)
        kept = torch.where(is_forced.unsqueeze(1), 0.0, logits.gather(1, tokens))
        return logits.masked_fill_(is_forced.unsqueeze(1), -torch.inf).scatter_(1, tokens, kept)

    def _forced(self, params: "SamplingParams") -> list[int]:
        """The tokens that can be forced: those before the first unknown one, and no more than a request can have."""
        given = (params.extra_args or {}).get(ARGUMENT) or ()
        return list(islice(takewhile(lambda token: token < self._vocabulary, given), self._longest))


def _is_token_list(given: object) -> bool:
    return isinstance(given, list) and all(isinstance(token, int) and token >= 0 for token in given)
