"""Training: losses, optimizers, schedules, checkpoints, the step and its handlers."""
