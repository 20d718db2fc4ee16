"""Uploads on a GPU: no step waits for one, and none overwrites what an earlier one has not sent yet."""

from __future__ import annotations

import numpy as np
import torch

from flashmemory_vllm.runtime.uploads import NUM_BUFFERS, UploadRing

# About a second: what waits for it is seen to.
LONG_CYCLES = 1_500_000_000


def test_each_upload_has_its_own_values_while_the_device_is_behind() -> None:
    ring = UploadRing(8, torch.device("cuda"))
    ring.upload(np.zeros(8, np.int32))
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)  # type: ignore[no-untyped-call]
    # As many as do not wait: the buffer of the upload before is the last one
    seen = [ring.upload(np.full(size, size, np.int32)).clone() for size in range(1, NUM_BUFFERS)]
    assert not torch.cuda.current_stream().query()
    seen += [ring.upload(np.full(size, size, np.int32)).clone() for size in (5, 6, 30)]
    assert [values.tolist() for values in seen] == [[size] * size for size in (1, 2, 3, 5, 6, 30)]
