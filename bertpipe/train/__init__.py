"""The loop, its optimizers, checkpoints and records, and the pretraining stage."""
