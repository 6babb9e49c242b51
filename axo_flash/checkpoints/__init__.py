"""Checkpoints that outlive a failing output directory: sealed on local disk, published, verified, found again.

trainer ─► session ─► writer (threads) ─► shelf ─► output ─► storage
              ├► resume ─► identity          manifest
              └► lease
"""

from axo_flash.checkpoints.resume import CheckpointError, Found
from axo_flash.checkpoints.session import Session
from axo_flash.checkpoints.writer import NotPublished

__all__ = ["CheckpointError", "Found", "NotPublished", "Session"]
