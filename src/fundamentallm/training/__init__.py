"""Steps: losses, optimizers, schedules, precision, checkpoints, the step and its handlers."""
