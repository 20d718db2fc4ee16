"""Device memory of layers beside managed ones: how vLLM lays out their blocks, and how many of these there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from flashmemory_vllm.errors import ConfigError

# Native layers never take more of the device's KV memory than this, unless one request needs it
MOST_NATIVE_SHARE = 0.5
# What prefix hits end at, a window or a state each: so many prefixes for each request that may run, in at most this
# share of the memory that these leave
KEPT_PREFIXES = 8
CHECKPOINT_SHARE = 0.2
# Two that a request writes in turn
STATE_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class NativeKind:
    """Layers of one kind beside managed ones, on one rank.

    Attributes:
        count: how many.
        page_bytes: of a block of one layer.
        block_size: tokens of a block.
        window: tokens that are attended to; 0 for layers with a state.
        state_blocks: that a request holds of these.
    """

    count: int
    page_bytes: int
    block_size: int
    window: int = 0
    state_blocks: int = STATE_BLOCKS

    def request_blocks(self, in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks that a request holds of a group of such layers, with so many tokens under way."""
        if not self.window:
            return self.state_blocks
        return ceil(min(self.window - 1 + in_flight_tokens, max_model_len) / self.block_size) + 1


class NativePool(NamedTuple):
    """The blocks of all native layers, which vLLM gives out of one pool.

    Attributes:
        block_bytes: of one block.
        request_blocks: that one request holds at most.
        decode_blocks: that it holds while it decodes, and that the end of a prefix is kept in.
    """

    block_bytes: int
    request_blocks: int
    decode_blocks: int

    def num_bytes(self, max_num_seqs: int, device_bytes: int) -> int:
        """Device memory for them.

        As many blocks as `max_num_seqs` requests hold while one of them is prefilled, if that is at most half of the
        memory, and beside them the ends of eight times as many prefixes, in at most a fifth of what is left.

        Args:
            max_num_seqs: most requests that run at once.
            device_bytes: device memory for KV.

        Raises:
            ConfigError: one request of the longest length does not fit.
        """
        # vLLM keeps the null block beside them
        one_request = (self.request_blocks + 1) * self.block_bytes
        if one_request > device_bytes:
            raise ConfigError(
                f"--kv-cache-memory-bytes: {device_bytes} bytes of device memory, but the layers other than full "
                f"attention need {one_request} for one request; give more, or lower --max-num-batched-tokens"
            )
        running = one_request + (max_num_seqs - 1) * self.decode_blocks * self.block_bytes
        running = max(one_request, min(running, int(device_bytes * MOST_NATIVE_SHARE)))
        kept = KEPT_PREFIXES * max_num_seqs * self.decode_blocks * self.block_bytes
        return running + min(kept, int((device_bytes - running) * CHECKPOINT_SHARE))

    def requests_in(self, num_bytes: int) -> int:
        """Requests that decode in so much memory while one more is prefilled."""
        blocks = num_bytes // self.block_bytes - 1
        return max(0, (blocks - self.request_blocks) // self.decode_blocks + 1)


def native_pool(kinds: Sequence[NativeKind], num_managed: int, in_flight_tokens: int, max_model_len: int) -> NativePool:
    """How vLLM groups native layers once it is told of as many managed ones as `layers.LayerSplit.announced` says.

    Args:
        kinds: at least one.
        num_managed: managed layers.
        in_flight_tokens: scheduled at most and not finished: a step's tokens for each step that may be under way.
        max_model_len: most tokens of a request.
    """
    most = min(num_managed, *(kind.count for kind in kinds))
    width = max(ceil(kind.count / ceil(kind.count / most)) for kind in kinds)
    groups = [ceil(kind.count / width) for kind in kinds]

    def blocks(in_flight: int) -> int:
        held = (kind.request_blocks(in_flight, max_model_len) for kind in kinds)
        return sum(number * count for number, count in zip(held, groups, strict=True))

    return NativePool(max(kind.page_bytes for kind in kinds) * width, blocks(in_flight_tokens), blocks(0))
