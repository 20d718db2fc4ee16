"""What the selector `oracle` knows where several captures are needed, as for prompts of several lengths."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flashmemory_vllm.capture.prompts import prompt_digest
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.oracle import Future


class RecordedPrompts(Future):
    """A future that can be put together, and asked what it knows.

    Args:
        block_size: tokens in a block of the recorded model.
        documents: by digest of its prompt the shard that holds one, and its place there.
    """

    def __init__(self, block_size: int, documents: Mapping[bytes, tuple[Path, int]]) -> None:
        super().__init__(block_size, documents)
        self.documents = documents

    @classmethod
    def load_all(cls, folders: Sequence[Path]) -> "RecordedPrompts":
        """Find the documents of several captures; see `Future.load`.

        Args:
            folders: at least one.

        Raises:
            ConfigError: a folder holds no fitting capture, or they differ in the size of blocks.
        """
        futures = [cls.load(folder) for folder in folders]
        sizes = {future.block_size for future in futures}
        if len(sizes) > 1:
            raise ConfigError(
                f"--oracle-data: recorded in blocks of {' and '.join(map(str, sorted(sizes)))} tokens; allowed are "
                "captures with blocks of one size"
            )
        documents: dict[bytes, tuple[Path, int]] = {}
        for future in futures:
            assert isinstance(future, RecordedPrompts)
            documents |= future.documents
        return cls(sizes.pop(), documents)

    def knows(self, ids: Sequence[int]) -> bool:
        """Whether a prompt was recorded."""
        return prompt_digest(ids) in self.documents
