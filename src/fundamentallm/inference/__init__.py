"""Use of trained models: loading, evaluation, generation."""
