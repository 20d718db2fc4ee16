"""What each block is remembered for: shares of attention in the steps so far, older ones faded."""

from flashmemory_kernels.remember_shares.channels import Channel, Channels
from flashmemory_kernels.remember_shares.naive import remembered
from flashmemory_kernels.remember_shares.op import remember_shares

__all__ = ["Channel", "Channels", "remember_shares", "remembered"]
