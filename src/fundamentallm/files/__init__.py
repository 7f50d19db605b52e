"""Files: system calls, locks, downloads, the layout of a run. No code for training."""
