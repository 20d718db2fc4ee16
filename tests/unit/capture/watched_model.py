"""A made-up model, whose every key is known, watched by a recorder."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from flashmemory_vllm.capture.document import Recording
from flashmemory_vllm.capture.labels import block_mass
from flashmemory_vllm.capture.passes import BatchRow
from flashmemory_vllm.capture.recorder import Choices, Recorder, RecorderSettings
from flashmemory_vllm.indexer.neural_model import pooled_keys

LAYERS, HQ, HKV, D, BS, SLOTS = 3, 4, 2, 8, 4, 64
ANCHORS = (0, 2)
SCALE, CHUNK = 0.4, 2


class Model:
    """Requests with random queries and keys, whose pages lie anywhere among the slots."""

    def __init__(self, lengths: Sequence[int], every: int = 1, *, window: int = 6, layer_mass: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.queries = [torch.randn(LAYERS, length, HQ, D, generator=generator) * 2 for length in lengths]
        self.keys = [torch.randn(LAYERS, length, HKV, D, generator=generator) for length in lengths]
        self.pages = torch.full((LAYERS, SLOTS, HKV, BS, D), torch.nan)
        self.slots = torch.randperm(SLOTS, generator=generator).view(len(lengths), -1).int()
        self.window = window
        settings = RecorderSettings(
            LAYERS, HQ, HKV * D, ANCHORS, BS, SCALE, Choices(every, CHUNK, window, layer_mass=layer_mass)
        )
        self.recorder = Recorder(settings, lambda layer, slots: self.pages[layer].index_select(0, slots))

    def step(self, rows: Sequence[tuple[int, int, int, int]]) -> None:
        """One forward pass of rows (request, prompt length, computed tokens, new tokens)."""
        self.recorder.begin(
            [BatchRow(str(index), prompt, done, new, self.slots[index]) for index, prompt, done, new in rows]
        )
        for layer in range(LAYERS):
            for index, _, done, new in rows:
                for token in range(done, done + new):
                    page = self.slots[index, token // BS]
                    self.pages[layer, page, :, token % BS] = self.keys[index][layer, token]
            query = torch.cat([self.queries[index][layer, done : done + new] for index, _, done, new in rows])
            self.recorder.layer(layer, query)
        self.recorder.end()

    def shares(self, index: int, position: int) -> torch.Tensor:
        """[L, Hq, n] of one token."""
        num_blocks = position // BS + 1
        padded = torch.zeros(LAYERS, num_blocks * BS, HKV, D)
        padded[:, : position + 1] = self.keys[index][:, : position + 1]
        blocks = padded.view(LAYERS, num_blocks, BS, HKV, D).transpose(2, 3)
        own = self.queries[index][:, position].unsqueeze(1)
        return block_mass(own, blocks, torch.full((LAYERS, 1), position), SCALE)[:, 0]

    def check(self, index: int, recording: Recording, positions: Iterator[int]) -> None:
        expected = list(positions)
        assert [token.position for token in recording.tokens] == expected
        for token in recording.tokens:
            shares = self.shares(index, token.position)
            np.testing.assert_allclose(token.mass, shares.mean((0, 1)), rtol=1e-5)
            np.testing.assert_allclose(token.largest, shares.amax((0, 1)).half(), rtol=1e-3, atol=1e-6)
            own = self.queries[index][list(ANCHORS), token.position].half()
            assert np.array_equal(token.queries, own.numpy())
            if token.layer_mass is not None:
                both = torch.stack((shares.mean(1), shares.amax(1))).half()
                np.testing.assert_allclose(token.layer_mass, both, rtol=1e-3, atol=1e-6)
        asked = range(max(0, expected[0] + 1 - self.window), expected[0])
        earlier = self.queries[index][list(ANCHORS)][:, asked].transpose(0, 1).half()
        assert np.array_equal(recording.prompt_queries, earlier.numpy())
        seen = [*recording.prompt_shares, *(token.of_anchors for token in recording.tokens)]
        for position, own in zip([*asked, *expected], seen, strict=True):
            shares, num_full = self.shares(index, position)[list(ANCHORS)], (position + 1) // BS
            of_full = shares[..., :num_full] / shares[..., :num_full].sum(-1, keepdim=True)
            np.testing.assert_allclose(own[:num_full], of_full.amax((0, 1)).half(), rtol=1e-3, atol=1e-6)
            assert not own[num_full:].any()
        num_full = recording.keys.shape[1] * CHUNK // BS
        assert num_full >= (expected[-1] + 1) // BS
        full = self.keys[index][list(ANCHORS), : num_full * BS].view(len(ANCHORS), num_full, BS, HKV, D)
        pooled = torch.stack([pooled_keys(layer.transpose(1, 2), CHUNK) for layer in full])
        np.testing.assert_allclose(recording.keys, pooled.numpy(), rtol=1e-3)
