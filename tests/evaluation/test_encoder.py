"""Encoders from files: runs of ours, plain state dicts, and what is not one."""

import re
import shutil

import pytest
import torch
import torchvision
from support.evaluations import COUNTS, write_run

from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.errors import CheckpointError, UserError
from ffcv_ssl.evaluation.encoder import keep_blocks, load_encoder, save_encoder
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.models import Model

RESNET18 = ModelConfig("resnet18", projector="")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a run's folder, its model)."""
    folder = tmp_path_factory.mktemp("runs") / "simclr"
    return folder, write_run(folder, "a.beton", "b.beton")


@pytest.fixture(scope="module")
def plain():
    """A torchvision ResNet-18 with statistics of its own."""
    torch.manual_seed(1)
    network = torchvision.models.resnet18()
    network.train()(torch.randn(4, 3, 32, 32))
    return network.eval()


def images(side=32):
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(2))


def assert_encodes_as(encoder, network):
    """The encoder's backbone gives what a torchvision network gives before its classifier."""
    features = torch.nn.Sequential(*list(network.children())[:-1])(images()).flatten(1)
    torch.testing.assert_close(encoder.encode(images())["backbone"], features.detach())


def test_a_runs_folder_gives_its_model_in_evaluation_mode_and_what_is_known_of_it(run):
    folder, model = run
    encoder = load_encoder(folder)
    assert encoder.widths == {"backbone": 512, "projector_1": 16, "projector_2": 8}
    features = encoder.encode(images())
    for depth, expected in model.encode(images()).items():
        torch.testing.assert_close(features[depth], expected.detach())
        assert features[depth].dtype == torch.float32 and not features[depth].requires_grad
    assert encoder.about == {**COUNTS, "step": 10, "epoch": 0.5}
    assert encoder.name == "simclr" and encoder.config["data"]["mean"] == [100, 101, 102]
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_a_kept_copy_is_named_after_its_epoch(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "simclr")
    shutil.copy(folder / "checkpoint.pt", folder / "checkpoint_epoch_0007.pt")
    encoder = load_encoder(folder / "checkpoint_epoch_0007.pt")
    assert encoder.name == "simclr epoch 7" and encoder.about["epoch"] == 7


def test_the_backbone_that_a_run_leaves_says_its_architecture_and_finds_its_run(run, tmp_path):
    folder, model = tmp_path / "finished", run[1]
    folder.mkdir()
    shutil.copy(run[0] / "metrics.jsonl", folder)
    (folder / "config.yaml").write_text("views: {small_images: true}\n")
    about = {"model": "resnet18", "stem": "imagenet"}
    checkpoint.save_weights(folder / "backbone.safetensors", model.backbone, about)
    encoder = load_encoder(folder)
    expected = model.encode(images())["backbone"].detach()
    torch.testing.assert_close(encoder.encode(images())["backbone"], expected)
    assert encoder.config == {"views": {"small_images": True}} and encoder.name == "finished"
    assert encoder.about == {"epoch": 0.4, "step": 8, "images": 320}


@pytest.mark.parametrize(
    "prefix",
    [
        "", "module.", "backbone.", "module.backbone.", "_orig_mod.", "module._orig_mod.",
        "_orig_mod.module.backbone.", "backbone._orig_mod.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_plain_state_dicts_load_with_known_prefixes_and_without_classifier(
    plain, tmp_path, prefix, wrapper
):
    state = {prefix + key: value for key, value in plain.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pth")
    encoder = load_encoder(tmp_path / "weights.pth", RESNET18)
    assert_encodes_as(encoder, plain)
    assert encoder.widths == {"backbone": 512} and encoder.name == "weights"
    assert encoder.config is None and encoder.about == {}


def test_safetensors_of_others_and_files_without_batch_counts_load(plain, tmp_path):
    from safetensors.torch import save_file

    state = {k: v for k, v in plain.state_dict().items() if "num_batches_tracked" not in k}
    save_file(state, tmp_path / "weights.safetensors")
    assert_encodes_as(load_encoder(tmp_path / "weights.safetensors", RESNET18), plain)


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": "{}"}, {"model": "resnet18"}, {"format": "pt", "about": "a net"},
        {"config": "a: 1", "about": "it"},
    ],
)  # fmt: skip
def test_metadata_of_others_is_not_taken_for_ours(plain, tmp_path, metadata):
    from safetensors.torch import save_file

    save_file(plain.state_dict(), tmp_path / "weights.safetensors", metadata=metadata)
    encoder = load_encoder(tmp_path / "weights.safetensors", RESNET18)
    assert_encodes_as(encoder, plain)
    assert encoder.config is None and encoder.about == {}


@pytest.mark.parametrize("config", [{"model": {"depth": 18}}, {"model": {"projector": "8"}}, {}, 3])
def test_a_configuration_of_others_beside_the_weights_is_left_alone(plain, tmp_path, config):
    torch.save({"config": config, "model": plain.state_dict()}, tmp_path / "weights.pth")
    encoder = load_encoder(tmp_path / "weights.pth", RESNET18)
    assert_encodes_as(encoder, plain)
    assert encoder.config is None


def test_a_runs_state_that_does_not_say_its_step_is_of_no_known_epoch(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    state = torch.load(folder / "checkpoint.pt")
    del state["step"]
    torch.save(state, folder / "checkpoint.pt")
    assert load_encoder(folder).about == COUNTS


def test_a_network_made_from_an_encoder_comes_back_with_its_layers_and_history(run, tmp_path):
    before = load_encoder(run[0])
    keep_blocks(before.model, 1)
    before.model.classifier = torch.nn.Linear(16, 3)
    save_encoder(tmp_path / "finetuned.safetensors", before.model, before, {"epoch": 2})
    after = load_encoder(tmp_path / "finetuned.safetensors")
    del before.model.classifier
    assert after.widths == {"backbone": 512, "projector_1": 16}
    assert after.about == {"epoch": 2} and after.config == before.config
    torch.testing.assert_close(after.encode(images()), before.encode(images()))
    assert len(after.model.projector[0]) == 3  # the block keeps its batch-norm and ReLU


def test_a_fine_tunings_folder_gives_the_network_and_its_own_state_is_refused(run, tmp_path):
    encoder = load_encoder(run[0])
    torch.nn.init.ones_(encoder.model.backbone.bn1.weight)
    encoder.model.backbone.bn1.weight += 1
    save_encoder(tmp_path / "finetuned.safetensors", encoder.model, encoder, {})
    state = {"format": 1, "config": {"model": {"backbone": None}}, "network": {}}
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    assert load_encoder(tmp_path).fingerprint == encoder.fingerprint
    text = refusal(tmp_path / "checkpoint.pt")
    assert "expected that of a pretraining run, or a fine-tuning's finetuned.safetensors" in text


def test_equal_weights_have_one_fingerprint_whatever_the_file(run, plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "a.pth")
    torch.save({"module." + k: v for k, v in plain.state_dict().items()}, tmp_path / "b.pth")
    prints = [load_encoder(tmp_path / name, RESNET18).fingerprint for name in ("a.pth", "b.pth")]
    assert prints[0] == prints[1] != load_encoder(run[0]).fingerprint
    plain.state_dict()["bn1.running_mean"][0] += 1e-3
    torch.save(plain.state_dict(), tmp_path / "c.pth")
    assert load_encoder(tmp_path / "c.pth", RESNET18).fingerprint != prints[0]
    plain.state_dict()["bn1.running_mean"][0] -= 1e-3


def test_bf16_is_asked_for_and_still_gives_float32(run):
    encoder = load_encoder(run[0])
    exact = encoder.encode(images())["backbone"]
    encoder.precision = "bf16"
    rounded = encoder.encode(images())["backbone"]
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)


def refusal(path, model=None):
    """The one line with which a file is refused."""
    with pytest.raises((UserError, CheckpointError)) as caught:
        load_encoder(path, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_architecture_is_refused_with_the_first_key_that_does_not_fit(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "a.pth")
    text = refusal(tmp_path / "a.pth", ModelConfig("resnet50", projector=""))
    assert re.search(r"a.pth: not a resnet50 .*layer1.0.conv1.weight is \[64, 64, 3, 3\]", text)
    text = refusal(tmp_path / "a.pth", ModelConfig("resnet34", projector=""))
    assert "not a resnet34" in text and "lacks backbone.layer1.2.conv1.weight" in text
    text = refusal(tmp_path / "a.pth", ModelConfig("resnet18", "cifar", projector=""))
    assert "with the cifar stem: backbone.conv1.weight is [64, 3, 7, 7], expected" in text
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "b.pth")
    assert "it has backbone.layer1.2.conv1.weight" in refusal(tmp_path / "b.pth", RESNET18)


def test_parts_that_were_compiled_one_by_one_load(plain, tmp_path):
    state = {k.replace(".conv1.", "._orig_mod.conv1."): v for k, v in plain.state_dict().items()}
    assert sum("_orig_mod" in key for key in state) == 8
    torch.save(state, tmp_path / "weights.pth")
    assert_encodes_as(load_encoder(tmp_path / "weights.pth", RESNET18), plain)


def test_where_a_key_lacks_the_first_one_that_is_there_is_named_as_the_file_has_it(plain, tmp_path):
    state = {f"module.encoder.{key}": value for key, value in plain.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    text = refusal(tmp_path / "a.pth", RESNET18)
    wanted = "it lacks backbone.conv1.weight [64, 3, 7, 7]"
    assert text.endswith(f"{wanted}; its first key is module.encoder.conv1.weight")
    torch.save({"fc.weight": torch.zeros(3, 512)}, tmp_path / "b.pth")
    assert refusal(tmp_path / "b.pth", RESNET18).endswith("its first key is fc.weight")


@pytest.mark.parametrize("key", ["conv1.weight", "bn1.running_var", "layer1.0.bn1.bias"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(plain, tmp_path, key, dtype):
    state = dict(plain.state_dict())
    state[key] = state[key].to(dtype)
    torch.save(state, tmp_path / "a.pth")
    got = f"backbone.{key} has values of {dtype}, expected floating point"
    assert refusal(tmp_path / "a.pth", RESNET18).endswith(f"a.pth: {got}; save them unquantised")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_floating_point_are_taken(plain, tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in plain.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    encoder = load_encoder(tmp_path / "a.pth", RESNET18)
    assert encoder.encode(images())["backbone"].dtype == torch.float32


def test_an_architecture_that_contradicts_the_file_is_refused(run):
    assert "got a resnet18 with the imagenet stem, but --model asks for a resnet50" in refusal(
        run[0], ModelConfig("resnet50", projector="")
    )
    assert load_encoder(run[0], RESNET18).widths["projector_2"] == 8


SAVED_HOW = "expected a run of ours, or what torch.save(model.state_dict(), FILE) writes"


def test_what_is_no_checkpoint_is_refused_in_one_line(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "a.pth")
    assert "give --model.backbone" in refusal(tmp_path / "a.pth")
    assert "no checkpoint.pt, backbone.safetensors or" in refusal(tmp_path)
    assert "no file or folder" in refusal(tmp_path / "nothing")
    (tmp_path / "text.pt").write_text("hello")
    text = refusal(tmp_path / "text.pt", RESNET18)
    assert text.endswith("(torch.save did not write it); " + SAVED_HOW) and "delete" not in text
    (tmp_path / "none.pt").write_bytes(b"")
    assert f"(it is empty); {SAVED_HOW}" in refusal(tmp_path / "none.pt", RESNET18)
    torch.save(plain, tmp_path / "module.pt")
    assert f"(it holds objects that are not tensors); {SAVED_HOW}" in refusal(
        tmp_path / "module.pt"
    )
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pth").read_bytes()[:5000])
    assert f"(it is damaged or cut off); {SAVED_HOW}" in refusal(tmp_path / "cut.pt", RESNET18)
    (tmp_path / "text.safetensors").write_text("hello")
    assert "not a readable safetensors" in refusal(tmp_path / "text.safetensors", RESNET18)
    config = {"model": {"backbone": "resnet18", "stem": "imagenet", "projector": ""}}
    for odd in (
        {"optimizer": {"lr": 1.0}}, {0: torch.zeros(1)}, {}, {"state_dict": {}},
        {"config": config, "model": {"lr": 1.0}}, {"config": config, "model": {0: torch.zeros(1)}},
        {"config": config, "model": "x"},
    ):  # fmt: skip
        torch.save(odd, tmp_path / "o.pt")
        assert "no state dict of tensors" in refusal(tmp_path / "o.pt", RESNET18)


@pytest.mark.parametrize("key", ["layer1.0.conv1.weight", "bn1.running_var"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_and_statistics_that_are_not_finite_are_refused(plain, tmp_path, key, value):
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    state[key].view(-1)[3] = value
    torch.save(state, tmp_path / "a.pth")
    text = refusal(tmp_path / "a.pth", RESNET18)
    assert f"backbone.{key} has values that are not finite" in text and "earlier" in text


def test_a_depth_that_is_not_there_is_named_beside_those_that_are(run):
    with pytest.raises(
        UserError, match=r"got 'projector_3'.*expected one of backbone, projector_1"
    ):
        load_encoder(run[0]).check_depths(["backbone", "projector_3"])


def test_weights_with_a_wrong_bit_are_one_line_and_no_result(tmp_path):
    model = Model(ModelConfig("tiny", projector=""))
    about = {"model": "tiny", "stem": "imagenet"}
    checkpoint.save_weights(tmp_path / "backbone.safetensors", model.backbone, about)
    checkpoint.save(tmp_path / "weights.pth", dict(model.backbone.state_dict()))
    for name, said in (
        ("backbone.safetensors", "not a readable safetensors file (it is damaged: it fails"),
        ("weights.pth", "not a readable checkpoint (it is damaged: "),
    ):
        content = bytearray((tmp_path / name).read_bytes())
        content[len(content) // 2] ^= 64  # an exponent's bit, in the middle of a tensor
        (tmp_path / name).write_bytes(content)
        with pytest.raises((UserError, CheckpointError), match=re.escape(f"{name}: {said}")):
            load_encoder(tmp_path / name, ModelConfig("tiny", projector=""))


@pytest.mark.parametrize(
    "changed",
    [{"stem": 3}, {"projector": 16}, {"backbone": ["tiny"]}, {"step": "ten"}, {"views": [1]}],
)
def test_a_checkpoint_that_contradicts_itself_is_one_line_with_the_way_back(run, tmp_path, changed):
    folder = shutil.copytree(run[0], tmp_path / "run")
    shutil.copy(folder / "checkpoint.pt", folder / "checkpoint_previous.pt")
    state = torch.load(folder / "checkpoint.pt")
    ((key, value),) = changed.items()
    (state if key in state else state["config"]["model"])[key] = value
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(CheckpointError) as caught:
        load_encoder(folder)
    line = str(caught.value)
    said = "lacks what a run's file says of its network, or contradicts it (TypeError: "
    assert line.startswith(f"{folder / 'checkpoint.pt'}: {said}") and "\n" not in line
    assert "; checkpoint_previous.pt is whole: " in line
    what = f"{key} is " if key in state else "the model's settings have "
    assert f"(TypeError: {what}{value!r}); " in line or key == "step"


def test_a_line_of_metrics_without_its_epoch_is_passed_over(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "epoch": "0.45"}\n{"step": 9, "epocj": 0.45}\n')
    assert load_encoder(folder).about["epoch"] == 0.5


def test_a_backbone_whose_history_is_no_mapping_is_one_line(run, tmp_path):
    about = {"model": "resnet18", "stem": "imagenet", "config": "3", "about": "{}"}
    path = tmp_path / "backbone.safetensors"
    checkpoint.save_weights(path, run[1].backbone, about)
    with pytest.raises(CheckpointError, match=r"contradicts .*got config or about as no mapping"):
        load_encoder(path)
