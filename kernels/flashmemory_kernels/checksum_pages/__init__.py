"""64-bit sums of pages, kept by block as they leave and compared as they come back."""

from flashmemory_kernels.checksum_pages.op import PageSet, store_checksums, verify_checksums

__all__ = ["PageSet", "store_checksums", "verify_checksums"]
