"""A server with log-probabilities and our counters, and rows of what it answered."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from flashmemory_vllm.evaluation.eval_rows import EvalRow, Side
from flashmemory_vllm.evaluation.loss import Losses
from flashmemory_vllm.evaluation.target import CONTEXT, FETCHED, FORCED_ARGUMENT, RESIDENT
from tests.unit.evaluation.fake_server import MAX_MODEL_LEN, FakeServer

VERSION = "0.32.0"
LOGPROB = -0.25


class FakeEngine(FakeServer):
    """Writes token ids, their text being the ids; each is as likely as `LOGPROB` says.

    Args:
        write: ids after a prompt's ids.
        share: blocks that decode attends to, over all; None for a server that does not tell, as stock vLLM.
        max_model_len: as told to clients.
        forces: whether it writes the tokens that a request forces.
        logprob: of every token.
    """

    def __init__(
        self,
        write: Callable[[Sequence[int]], Sequence[int]],
        share: float | None = None,
        max_model_len: int = MAX_MODEL_LEN,
        *,
        forces: bool = True,
        logprob: float = LOGPROB,
    ) -> None:
        super().__init__(str, max_model_len)
        self._forces = forces
        self._logprob = logprob
        self._write = write
        self._share = share

    def page(self, path: str) -> str:
        """The version, the metrics or the models."""
        if path == "/version":
            return json.dumps({"version": VERSION})
        if path != "/metrics":
            return super().page(path)
        if self._share is None:
            return 'vllm:request_success_total{engine="0"} 1.0\n'
        blocks = 100.0 * len(self.requests)
        told = {RESIDENT: blocks * self._share, CONTEXT: blocks, FETCHED: blocks * self._share / 10}
        return "".join(f'{name}{{engine="0"}} {value}\n' for name, value in told.items())

    def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One answer of at most `max_tokens` ids."""
        answer = super().complete(path, body)
        forced = body.get("vllm_xargs", {}).get(FORCED_ARGUMENT)
        ids = list(self._write(body["prompt"]) if forced is None or not self._forces else forced)[: body["max_tokens"]]
        (choice,) = answer["choices"]
        choice["text"] = " ".join(map(str, ids))
        if body.get("logprobs"):
            names = [f"token_id:{token}" for token in ids]
            choice["logprobs"] = {
                "tokens": names,
                "token_logprobs": [self._logprob] * len(ids),
                "top_logprobs": [{name: self._logprob} for name in names],
                "text_offset": [0] * len(ids),
            }
        return answer


def make_eval_row(side: Side, **changes: Any) -> EvalRow:
    """A row of the needles, with some of its fields changed."""
    row: dict[str, Any] = {
        "task": "needle",
        "tokens": 4096,
        "depth": 0.5,
        "questions": 4,
        "score": 1.0,
        "suite": "needles",
        "side": side,
        "part": "needles 4096",
        "settings": {"seed": 0},
        "resident_share": 0.135 if side == "sparse" else None,
        "seconds": 1.5,
        "server_version": VERSION,
        "command": "flashmemory eval",
        "commit": "abc",
        "gpu": "none",
        "versions": {"python": "3.11"},
    }
    return EvalRow(**row | changes)


def make_loss_row(side: Side, loss: float, **changes: Any) -> EvalRow:
    """A row of two documents whose tokens have the same loss, forced along 19 tokens each."""
    details = asdict(Losses(19, [loss] * 2, [[loss] * 2] * 2, 0.5, 0.5 if side == "sparse" else None))
    row = {"suite": "loss", "task": "loss", "part": "loss 4096", "depth": None, "score": None, "details": details}
    return make_eval_row(side, **row | {"questions": 2} | changes)
