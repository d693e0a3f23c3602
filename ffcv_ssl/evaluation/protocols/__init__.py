"""Protocols that measure one checkpoint, each in one module.

`PROTOCOLS` maps a protocol's name to (dataclass of its settings, function, one-line summary). The
function is `run(config, world, stop) -> record`.
"""

from __future__ import annotations

from ffcv_ssl.evaluation.protocols import export, finetune, linear, neighbours, transfer

PROTOCOLS = {
    "linear": (linear.LinearConfig, linear.run_linear, "linear probes on frozen features"),
    "mlp": (linear.MLPConfig, linear.run_mlp, "probes with hidden layers: 2048-2048-classes"),
    "knn": (neighbours.KNNConfig, neighbours.run_knn, "votes of the nearest training images"),
    "snn": (neighbours.SNNConfig, neighbours.run_snn, "SuNCEt's non-parametric inference"),
    "finetune": (finetune.FineTune, finetune.run, "the whole network, trained on few labels"),
    "transfer": (transfer.Transfer, transfer.run, "the same on other data, over a grid of rates"),
    "export": (export.ExportConfig, export.run, "weights for torchvision and timm, model card"),
}
