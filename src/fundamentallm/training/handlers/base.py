"""The registry of handlers, and what a handler is.

A handler is any object with `attach(trainer)`, which adds its methods to events:

```python
@HANDLERS.register("gradient_noise")
class GradientNoise:
    '''Observes: ...'''

    def __init__(self, every: int = 100) -> None: ...

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self.measure)
```

No base class is needed. A handler with an attribute `role` takes that role in the loop, in place
of the handler that plays it by default: "schedule" (sets learning rates), "evaluation" (measures
at FLLM_EVALUATION_DUE), "recovery" (acts on refused steps), "throughput" (measures the speed). A
handler with `state_dict` and `load_state_dict` is part of every checkpoint from the moment that it
is attached. Under `handlers:` in a YAML its options are the constructor's parameters, but for
those that the program supplies (listed below) and those that take a function, a stream or another
object; those are for callers in Python.
"""

from __future__ import annotations

from typing import Any, Protocol

from fundamentallm.registry import Registry


class Handler(Protocol):
    """A listener to the events of a training loop."""

    def attach(self, trainer: Any) -> None:  # a `TrainingLoop`, or the `Trainer` that is one
        """Add this handler's methods to the trainer's events."""


HANDLERS: Registry[Handler] = Registry(
    "handler",
    supplied=("scheduler", "tokenizer", "run_dir", "checkpoint_dir", "seed"),
)
