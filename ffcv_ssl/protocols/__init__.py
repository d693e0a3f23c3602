"""The protocols of evaluate.py: what a frozen or fine-tuned encoder is worth, each in one module.

`PROTOCOLS` maps a protocol's name to (dataclass of its settings, function, one-line summary). The
function is `run(config, world, stop) -> record`; the command calls it once for each checkpoint, or
once for all of them where the dataclass' `checkpoint` is a list.
"""

from __future__ import annotations

from ffcv_ssl.protocols import curve, export, finetune, linear, neighbours, seeds, suite, transfer

PROTOCOLS = {
    "linear": (linear.LinearConfig, linear.run_linear, "linear probes on frozen features"),
    "mlp": (linear.MLPConfig, linear.run_mlp, "probes with hidden layers: 2048-2048-classes"),
    "knn": (neighbours.KNNConfig, neighbours.run_knn, "votes of the nearest training images"),
    "snn": (neighbours.SNNConfig, neighbours.run_snn, "SuNCEt's non-parametric inference"),
    "finetune": (finetune.FineTune, finetune.run, "the whole network, trained on few labels"),
    "transfer": (transfer.Transfer, transfer.run, "the same on other data, over a grid of rates"),
    "suite": (suite.SuiteConfig, suite.run, "probes on several datasets: a table and a chart"),
    "seeds": (seeds.SeedsConfig, seeds.run, "mean and spread of results over seeds"),
    "curve": (curve.CurveConfig, curve.run, "a protocol over checkpoints; compute to reach X"),
    "export": (export.ExportConfig, export.run, "weights for torchvision and timm, model card"),
}
