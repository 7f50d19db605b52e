"""Train a language model on your own text: an event-driven engine on PyTorch-Ignite.

config describes, data feeds, models compute, training steps, handlers listen, inference uses,
engine commands.
"""

import os

__version__ = "0.1.0"

# How often the threads of torch and of native code (libgomp) look for work before they sleep. By
# default it is for long, in which a waiting thread keeps a core from the one it waits for
# where other programs run too: a step took four times as long. libgomp reads it at `import torch`.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "100000"
