"""An engine that gives each answer a token a step."""

from collections.abc import Mapping, Sequence

from flashmemory_vllm.soak.drive import Part
from flashmemory_vllm.soak.trace import SoakRequest


def right_token(prompt: Sequence[int], place: int) -> int:
    """What the model of this engine says after a prompt and `place` more tokens."""
    return (sum(prompt) + place) % 1000


class FakeEngine:
    """Keeps everything that it was told.

    Args:
        silent: requests that get no token.
    """

    def __init__(self, silent: Sequence[str] = ()) -> None:
        self._silent = set(silent)
        self._running: dict[str, tuple[SoakRequest, list[int], int]] = {}
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.most_running = 0
        self.num_steps = 0

    def add(self, request: SoakRequest, prompt: Sequence[int]) -> None:
        """Start a request."""
        self.added.append(request.name)
        self._running[request.name] = request, list(prompt), 0
        self.most_running = max(self.most_running, len(self._running))

    def abort(self, name: str) -> None:
        """End a request."""
        self.aborted.append(name)
        del self._running[name]

    def step(self) -> list[Part]:
        """A token for everybody."""
        self.num_steps += 1
        parts = []
        for name, (request, prompt, done) in list(self._running.items()):
            if name in self._silent:
                continue
            tokens = [right_token(prompt, place) for place in range(done + 1)]
            given = tokens[-1:] if request.is_streamed else tokens
            is_last = done + 1 == request.max_tokens
            parts += [Part(name, n, given, not request.is_streamed, is_last) for n in range(request.num_answers)]
            self._running[name] = request, prompt, done + 1
            if is_last:
                del self._running[name]
        return parts

    def has_work(self) -> bool:
        """Whether anybody runs."""
        return bool(self._running)

    def look(self) -> Mapping[str, float]:
        """One gauge."""
        return {"running": float(len(self._running))}

    def measure(self) -> Mapping[str, float]:
        """One figure."""
        assert not self._running
        return {"rss_mib": 1.0}
