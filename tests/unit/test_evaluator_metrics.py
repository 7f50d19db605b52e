"""Every metric of the installed Ignite, on the evaluator: it measures, or it is not for tokens."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import ignite.metrics
import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine
from ignite.metrics import Metric
from torch import Tensor

from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.trainer import Trainer

V = 11


def class_of(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Predicted and true tokens, as numbers."""
    return output[0].argmax(1), output[1]


def one_hot(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return output[0].softmax(1), F.one_hot(output[1], V)


def probabilities(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return one_hot(output)[0], F.one_hot(output[1], V).float()


def mean_largest(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[0].softmax(1).max(1).values.mean()


# With the output as it is: (logits (N, V), targets (N,)).
AS_IT_IS: dict[str, dict[str, Any]] = {
    "Accuracy": {},
    "ConfusionMatrix": {"num_classes": V},
    "Entropy": {},
    "EpochMetric": {"compute_fn": lambda p, y: float((p.argmax(1) == y).float().mean())},
    "MeanAveragePrecision": {},
    "Loss": {"loss_fn": F.cross_entropy},
    "MutualInformation": {},
    "Perplexity": {},
    "Precision": {"average": "macro"},
    "Recall": {"average": "macro"},
    "TopKCategoricalAccuracy": {"k": 3},
}
# With a function that makes of the output what the metric is defined for.
WITH_A_TRANSFORM: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Average": (mean_largest, {}),
    "CohenKappa": (class_of, {}),
    "GeometricAverage": (mean_largest, {}),
    "VariableAccumulation": (mean_largest, {"op": lambda total, x: total + x}),
    "RunningAverage": (mean_largest, {}),
    "Frequency": (lambda output: len(output[1]), {}),
    "CosineSimilarity": (probabilities, {}),
    "HitRate": (one_hot, {"top_k": [3]}),
    "NDCG": (one_hot, {"top_k": [3]}),
    "KLDivergence": (lambda output: (output[0], output[0].flip(1)), {}),
    "JSDivergence": (lambda output: (output[0], output[0].flip(1)), {}),
    "MeanAbsoluteError": (probabilities, {}),
    "MeanSquaredError": (probabilities, {}),
    "RootMeanSquaredError": (probabilities, {}),
    "MeanPairwiseDistance": (probabilities, {}),
    "MultiLabelConfusionMatrix": (
        lambda output: (F.one_hot(output[0].argmax(1), V), F.one_hot(output[1], V)),
        {"num_classes": V},
    ),
}
# What they compare is not the distribution over a vocabulary and a token.
NOT_FOR_TOKENS = {
    "images": "FID InceptionScore PSNR SSIM CommonObjectDetectionMetrics"
    " ObjectDetectionAvgPrecisionRecall",
    "texts": "Bleu CharacterErrorRate Rouge RougeL RougeN",
    "clusters and samples": "CalinskiHarabaszScore DaviesBouldinScore SilhouetteScore HSIC"
    " MaximumMeanDiscrepancy",
    "the machine": "GpuInfo",
}
NOT_FOR_TOKENS_EITHER = ("ignite.metrics.regression.", "ignite.metrics.fairness.")
NEEDS_SCIKIT_LEARN = "AveragePrecision MatthewsCorrCoef PrecisionRecallCurve ROC_AUC RocCurve"
OF_OTHER_METRICS = "MetricGroup MetricsLambda"


def installed() -> dict[str, type[Metric]]:
    modules = [ignite.metrics] + [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(ignite.metrics.__path__, "ignite.metrics.")
    ]
    return {
        name: kind
        for module in modules
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and issubclass(kind, Metric)
        and not inspect.isabstract(kind)
        and not name.startswith("_")
    }


def test_no_metric_of_the_installed_ignite_is_left_out():
    listed = {*AS_IT_IS, *WITH_A_TRANSFORM}
    for names in (*NOT_FOR_TOKENS.values(), NEEDS_SCIKIT_LEARN, OF_OTHER_METRICS):
        listed.update(names.split())
    others = {
        name
        for name, kind in installed().items()
        if not kind.__module__.startswith(NOT_FOR_TOKENS_EITHER)
    }
    assert others == listed


def build(name: str) -> Metric:
    kind = installed()[name]
    if name in AS_IT_IS:
        return kind(**AS_IT_IS[name])
    transform, options = WITH_A_TRANSFORM[name]
    return kind(output_transform=transform, **options)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # in Ignite's gathering
@pytest.mark.parametrize("name", [*AS_IT_IS, *WITH_A_TRANSFORM])
def test_a_metric_says_what_it_says_on_a_plain_engine(name):
    torch.manual_seed(0)
    train, val = tiny_loaders()
    trainer = Trainer(tiny_model(), train, val, device="cpu")
    build(name).attach(trainer.evaluator, "found")
    found = trainer.validate()["val/found"]

    def step(_: Engine, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = trainer.model.eval()(batch["input_ids"])
        valid = batch["target_ids"] >= 0
        return logits[valid], batch["target_ids"][valid]

    engine = Engine(step)
    build(name).attach(engine, "found")
    expected = engine.run(val).metrics["found"]
    if name == "Frequency":  # of seconds
        assert found > 0
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected
