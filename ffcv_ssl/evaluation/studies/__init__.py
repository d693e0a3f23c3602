"""Studies: one protocol over several checkpoints, datasets or seeds, each in one module.

`STUDIES` has entries as `ffcv_ssl.evaluation.protocols.PROTOCOLS`.
"""

from __future__ import annotations

from ffcv_ssl.evaluation.studies import curve, seeds, suite

STUDIES = {
    "suite": (suite.SuiteConfig, suite.run, "probes on several datasets: a table and a chart"),
    "seeds": (seeds.SeedsConfig, seeds.run, "mean and spread of results over seeds"),
    "curve": (curve.CurveConfig, curve.run, "a protocol over checkpoints; compute to reach X"),
}
