"""Export: files that others' libraries load, and a card that says what is known."""

import json

import pytest
import torch
import torchvision
import yaml
from safetensors.torch import load_file

from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import results
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.evaluation.model_card import write_card
from ffcv_ssl.evaluation.protocol_settings import Architecture
from ffcv_ssl.evaluation.protocols import export
from ffcv_ssl.training.checkpoint import save_weights
from ffcv_ssl.training.metrics_log import MetricsLog
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.world import World

pytestmark = pytest.mark.whole  # whole commands on runs of their own

RUN = {
    "method": "simclr", "seed": 3, "epochs": 20,
    "data": {"train": "/data/tiny_train.beton", "val": "tiny_val.beton", "batch_size": 64,
             "mean": [10, 20, 30], "std": [1, 2, 3]},
    "views": {"recipe": "simclr"}, "resolution": {"min": 16, "max": 32},
    "evaluation": {"resolution": None},
    "optim": {"name": "sgd", "lr": 0.3, "lr_scaling": "linear", "weight_decay": 1e-4},
    "labelled": {"loss": "suncet", "unsupervised_batch_size": None,
                 "labels": {"scheme": "bernoulli", "fraction": 0.1, "count": None}},
}  # fmt: skip


@pytest.fixture(params=["imagenet", "cifar"])
def stem(request):
    return request.param


@pytest.fixture
def run_folder(tmp_path, stem):
    """A run's folder with a checkpoint at step 40 and metrics of that step."""
    model = {"backbone": "resnet18", "stem": stem, "projector": "16-8", "projector_norm": "hidden"}
    torch.manual_seed(0)
    state = Model(ModelConfig(**model)).state_dict()
    for value in state.values():
        if value.is_floating_point():
            value += 0.1 * torch.randn_like(value).abs() * value.abs().mean()
    config = {**RUN, "model": model}
    counters = {"step": 40, "updates": 40, "images": 2560, "views": 5120, "flops": 7e12}
    saved = {"config": config, "model": state, **counters, "seconds": 5400.0}
    torch.save(saved, tmp_path / "checkpoint.pt")
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write({"step": 20, "epoch": 10, "val/backbone/top1": 0.25, "val/projector_1/top1": 0.2})
    log.write({"step": 40, "epoch": 20, "val/backbone/top1": 0.5, "val/knn/top5": 0.75})
    log.close()
    return tmp_path


def do_export(path, **settings):
    settings = export.ExportConfig(checkpoint=str(path), **settings)
    return export.run(settings, World.join("cpu", 1), None)


def prepared(network, stem):
    """A network without classifier that takes weights of that stem, as the card says."""
    if stem == "cifar":
        channels = network.conv1.out_channels
        network.conv1 = torch.nn.Conv2d(3, channels, 3, stride=1, padding=1, bias=False)
        network.maxpool = torch.nn.Identity()
    return network.eval()


def test_the_exported_weights_load_strictly_into_torchvision_and_timm_and_compute_the_same(
    run_folder, stem
):
    out = do_export(run_folder)["out"]
    weights = load_file(f"{out}/backbone.safetensors")
    plain = torchvision.models.resnet18()
    plain.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 32, 32)
    expected = load_encoder(run_folder).encode(images)["backbone"]
    networks = [plain]
    timm = pytest.importorskip("timm", reason="timm is not installed")
    networks.append(timm.create_model("resnet18", num_classes=0))
    for network in networks:
        prepared(network, stem).load_state_dict(weights, strict=True)
        with torch.no_grad():
            torch.testing.assert_close(network(images), expected)


def test_the_code_in_the_card_runs_as_it_stands(run_folder, stem, monkeypatch):
    out = do_export(run_folder)["out"]
    monkeypatch.chdir(out)
    card = (run_folder / "export/README.md").read_text()
    blocks = [part.partition("```")[0] for part in card.split("```python\n")[1:]]
    assert len(blocks) == 2
    names = {}
    exec(blocks[0], names)  # imports and torchvision
    assert names["model"](torch.rand(1, 3, 32, 32)).shape == (1, 512)
    pytest.importorskip("timm", reason="timm is not installed")
    exec(blocks[1], names)
    assert names["model"](torch.rand(1, 3, 32, 32)).shape == (1, 512)


def test_the_exported_file_alone_says_where_it_comes_from(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("elsewhere")
    do_export(run_folder, out=str(out))
    there, here = load_encoder(out / "backbone.safetensors"), load_encoder(run_folder)
    assert there.config == here.config and there.about == here.about
    assert list(there.widths) == ["backbone"]


@pytest.mark.parametrize("stem", ["imagenet"], indirect=True)
def test_the_card_tells_data_settings_counters_and_what_was_measured(run_folder):
    record = {
        "protocol": "linear", "name": run_folder.name, "about": {"step": 40},
        "data": {"val": "other.beton"}, "metrics": {"backbone": {"top1": 0.625, "lr": 3.0}},
    }  # fmt: skip
    results.report(record, run_folder)
    results.report({**record, "about": {"step": 20}, "metrics": {"top1": 0.111}}, run_folder)
    results.report({**record, "weights": "others", "metrics": {"top1": 0.222}}, run_folder)
    metrics = do_export(run_folder)["metrics"]
    card = (run_folder / "export/README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["datasets"] == ["tiny_train"]
    for told in (
        "SimCLR + suncet on labels", '{"scheme": "bernoulli", "fraction": 0.1}', "16 to 32 px",
        "40 updates, 2,560 images, 5,120 views, 7e+12 FLOPs, 1.5 hours", "20 epochs planned",
        "| online | tiny_val | backbone/top1 | 50.00% |", "| online | tiny_val | knn/top5 | 75.00%",
        "| linear | other | backbone.top1 | 62.50% |", "(10, 20, 30)", "(1, 2, 3)", "`16-8`",
    ):  # fmt: skip
        assert told in body, told
    assert "25.00%" not in body and "11.10%" not in body and "/data/" not in card
    assert "22.20%" not in body
    assert [m["value"] for m in metrics] == [0.5, 0.75, 0.625]


def test_a_card_of_weights_from_elsewhere_claims_nothing(tmp_path):
    card = write_card(tmp_path, "resnet18", "imagenet", "backbone.safetensors")
    body = card.split("---\n")[2]
    assert body.count("\n- ") == 1 and "- Architecture" in body
    assert "Method" not in card and "What it is worth" not in card


@pytest.mark.parametrize("stem", ["imagenet"], indirect=True)
def test_a_kept_copy_is_exported_beside_the_last_checkpoint(run_folder):
    (run_folder / "checkpoint.pt").rename(run_folder / "checkpoint_epoch_0010.pt")
    exported = do_export(run_folder / "checkpoint_epoch_0010.pt")
    assert exported["out"] == str(run_folder / "export_checkpoint_epoch_0010")


def test_a_bare_state_dict_needs_its_architecture(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"give --model\.backbone"):
        do_export(tmp_path / "net.pth")
    exported = do_export(tmp_path / "net.pth", model=Architecture("resnet18"))
    assert exported["backbone"] == "resnet18" and json.dumps(exported)


def test_a_backbone_that_others_do_not_know_is_refused_in_one_line(tmp_path):
    config = ModelConfig("tiny", "imagenet", "")
    save_weights(
        tmp_path / "tiny.safetensors", Model(config).backbone, {"model": "tiny", "stem": "imagenet"}
    )
    with pytest.raises(UserError, match="got a backbone 'tiny', expected a ResNet"):
        do_export(tmp_path / "tiny.safetensors", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
