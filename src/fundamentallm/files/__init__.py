"""Bytes on a disk: system calls, locks, names. Knows nothing of training."""
