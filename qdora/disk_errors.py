"""Why a write failed, in words."""

from __future__ import annotations

import errno
import os

from qdora.access_tokens import masked

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FULL = "the disk is full"


def disk_reason(error: BaseException) -> str | None:
    """Why a write failed, or None for an error of another kind.

    Libraries written in Rust or C++ report a full disk by an error class of their own with the system's text.
    """
    if isinstance(error, OSError):
        return DISK_FULL if error.errno in _FULL else masked(str(error))
    full = any(os.strerror(number) in str(error) for number in _FULL)
    return DISK_FULL if isinstance(error, Exception) and full else None
