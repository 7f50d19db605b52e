"""Train a language model on your own text: an event-driven engine on PyTorch-Ignite.

config describes, data feeds, models compute, training steps, handlers listen, inference uses,
engine commands.
"""

__version__ = "0.1.0"
