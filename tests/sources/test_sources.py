"""Sources number samples and classes the same everywhere, and say what they miss."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from ffcv_ssl.errors import SourceError
from ffcv_ssl.fields import EncodedImage
from ffcv_ssl.sources import Source, open_source, select


def make_folder(root, names, size_px=8):
    """Write a small image of its own colour for each of `names` (paths relative to `root`)."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size_px, size_px), (number * 10 % 256, 90, 20)).save(path)
    return root


def labels(source):
    return [source.dataset[index][1] for index in range(len(source.dataset))]


def test_order_and_labels_are_those_of_the_sorted_paths(tmp_path):
    names = ["b/2.png", "b/10.png", "a/x.jpg", "c/deep/er/1.bmp", "B/0.png"]
    source = open_source("imagefolder", make_folder(tmp_path, names))
    assert list(source.names) == ["B/0.png", "a/x.jpg", "b/10.png", "b/2.png", "c/deep/er/1.bmp"]
    assert source.class_names == {"label": ["B", "a", "b", "c"]}
    assert labels(source) == [0, 1, 2, 2, 3]


def test_the_files_own_bytes_are_handed_on(tmp_path):
    source = open_source("imagefolder", make_folder(tmp_path, ["a/x.jpg"]))
    image, _ = source.dataset[0]
    assert isinstance(image, EncodedImage)
    assert image.data == (tmp_path / "a/x.jpg").read_bytes()


def test_images_without_class_folders_have_no_label(tmp_path):
    source = open_source("imagefolder", make_folder(tmp_path, ["2.png", "1.png"]))
    assert source.fields == {} and source.class_names == {}
    assert len(source.dataset) == 2 and len(source.dataset[0]) == 1


@pytest.mark.parametrize("folder", ["unlabelled", "unlabeled", "Unlabelled"])
def test_unlabelled_images_have_label_minus_one_and_are_no_class(tmp_path, folder):
    names = ["cat/1.png", f"{folder}/1.png", "beside.png", "zebra/1.png"]
    source = open_source("imagefolder", make_folder(tmp_path, names))
    assert source.class_names == {"label": ["cat", "zebra"]}
    by_name = dict(zip(source.names, labels(source)))
    assert by_name == {"cat/1.png": 0, f"{folder}/1.png": -1, "beside.png": -1, "zebra/1.png": 1}


def test_an_unlabelled_folder_alone_makes_no_labels(tmp_path):
    source = open_source("imagefolder", make_folder(tmp_path, ["unlabelled/1.png"]))
    assert source.fields == {}


def test_hidden_files_and_other_files_are_skipped(tmp_path):
    make_folder(tmp_path, ["a/1.png", "a/.2.png", ".git/3.png"])
    (tmp_path / "a/readme.txt").write_text("no image")
    assert open_source("imagefolder", tmp_path).names == ["a/1.png"]


def test_a_class_missing_from_a_split_shifts_no_label(tmp_path):
    make_folder(tmp_path, ["train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png"])
    source = open_source("imagefolder", tmp_path, "val")
    assert labels(source) == [2]
    assert source.class_names["label"] == ["a", "b", "c"]


def test_a_class_that_training_lacks_is_refused(tmp_path):
    make_folder(tmp_path, ["train/a/1.png", "val/dog/1.png"])
    with pytest.raises(SourceError, match="got class 'dog', expected one of the 1 classes"):
        open_source("imagefolder", tmp_path, "val")


def test_train_is_the_split_where_none_is_asked_for(tmp_path):
    make_folder(tmp_path, ["train/a/1.png", "val/a/2.png"])
    source = open_source("imagefolder", tmp_path)
    assert source.names == ["a/1.png"]
    assert source.made == {"source": "imagefolder", "split": "train"}


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["train/a/1.png"], "tset", "--split: .*tset: no such folder, .* has train"),
        (["a/1.png"], "train", "--split: .*no such folder, .* has a"),
        (["val/a/1.png"], None, "--split: missing, expected one of val; .* has no train"),
        ([], None, "no image files"),
    ],
)
def test_a_folder_that_is_not_there_is_named(tmp_path, names, split, message):
    with pytest.raises(SourceError, match=message):
        open_source("imagefolder", make_folder(tmp_path, names), split)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "hf:imagenet",
            {},
            "unknown source 'hf:imagenet', expected shapes, imagefolder, clevr or .*cifar10",
        ),
        ("webdataset", {}, "unknown source"),
        ("visiondataset", {}, "unknown source"),
        ("imagefolder", {}, "--root: missing"),
        ("imagefolder", {"root": "/no/such"}, "--root: /no/such: no such folder"),
        ("imagefolder", {"root": "/", "size_px": 8}, "--size_px: source 'imagefolder' has no such"),
        ("shapes", {"root": "/"}, "--root: source 'shapes' has no such setting"),
        ("shapes", {"size_px": 2}, "size_px: got 2"),
        ("cifar10", {}, "--root: missing"),
        ("cifar10", {"root": "/no/such"}, "cifar10: Dataset not found.*--download"),
        (
            "cifar10",
            {"root": "/no/such", "split": "dev"},
            "got 'dev', expected train or test .* for cifar10",
        ),
        (
            "fakedata",
            {"split": "val"},
            "got 'val', expected none or train; fakedata has no",
        ),
        ("fakedata", {"download": True}, "--download: torchvision offers no download"),
        ("cocodetection", {"root": "/"}, "cocodetection: "),
    ],
)
def test_what_cannot_be_opened_is_said_on_one_line(name, options, message):
    with pytest.raises(SourceError, match=message) as error:
        open_source(name, **options)
    assert "\n" not in str(error.value)


def test_any_torchvision_dataset_of_pairs_is_a_source(monkeypatch):
    from torchvision import datasets

    class Tiny(datasets.VisionDataset):
        classes = (("tench", "Tinca"), "shark")

        def __init__(self, root, train=True, transform=None, download=False):
            super().__init__(root)
            self.number = 1 if train else 0

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Image.new("RGB", (4, 4)), np.int64(self.number)

    monkeypatch.setattr(datasets, "Tiny", Tiny, raising=False)
    train, held_out = (open_source("tiny", "/any", split) for split in ("train", "val"))
    assert train.class_names == {"label": ["tench, Tinca", "shark"]}
    assert labels(train) == [1, 1, 1] and labels(held_out) == [0, 0, 0]
    assert type(train.dataset[0][1]) is int


def test_torchvision_datasets_of_files_hand_on_the_bytes(tmp_path, monkeypatch):
    from torchvision import datasets

    class Pets(datasets.ImageFolder):
        def __init__(self, root, split="train"):
            super().__init__(os.path.join(root, split))

    monkeypatch.setattr(datasets, "Pets", Pets, raising=False)
    make_folder(tmp_path, ["train/cat/1.jpg", "train/dog/2.jpg"])
    source = open_source("pets", tmp_path)
    assert source.names == ["cat/1.jpg", "dog/2.jpg"]  # lists of names choose among them
    image, label = source.dataset[1]
    assert image.data == (tmp_path / "train/dog/2.jpg").read_bytes() and label == 1


def test_a_dataset_that_is_not_of_pairs_is_refused(monkeypatch):
    from torchvision import datasets

    class Boxes(datasets.VisionDataset):
        def __init__(self, root):
            super().__init__(root)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return io.BytesIO(), {"boxes": []}

    monkeypatch.setattr(datasets, "Boxes", Boxes, raising=False)
    with pytest.raises(SourceError, match="expected a dataset of \\(image, class label\\)"):
        open_source("boxes", "/any")


def make_clevr(root, depths):
    """CLEVR's folders under `root`, with a scene for each list of its objects' depths."""
    names = [f"CLEVR_val_{number:06}.png" for number in range(len(depths))]
    make_folder(root, [f"CLEVR_v1.0/images/val/{name}" for name in names])
    scenes = [
        {"image_filename": name, "objects": [{"pixel_coords": [9, 8, depth]} for depth in of_one]}
        for name, of_one in zip(names, depths)
    ]
    path = root / "CLEVR_v1.0/scenes/CLEVR_val_scenes.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"info": {}, "scenes": scenes}))
    return root


def vtab_distance(depths):
    """VTAB's label: the last of its thresholds that is less than the nearest object's depth."""
    thresholds = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0])
    return int(np.max(np.where(thresholds - min(depths) < 0)))


def test_clevr_has_the_labels_of_vtab(tmp_path):
    depths = [[near, 12.0, 20.5] for near in (3.1, 8.0, 8.01, 8.5, 8.75, 9.2, 9.5, 9.9, 10.0, 11)]
    depths.append([9.0] * 10)
    source = open_source("clevr", make_clevr(tmp_path, depths), "val")
    samples = [source.dataset[index] for index in range(len(depths))]
    assert [count for _, count, _ in samples] == [0] * 10 + [7]
    assert [near for _, _, near in samples] == [vtab_distance(of_one) for of_one in depths]
    assert source.class_names["count"][7] == "10 objects"
    image = tmp_path / "CLEVR_v1.0/images/val" / source.names[4]
    assert samples[4][0].data == image.read_bytes()


@pytest.mark.parametrize(
    ("depths", "split", "message"),
    [
        ([[1.0] * 3], "test", "--split: got 'test', expected train or val, which have labels"),
        ([[1.0] * 3], "train", "CLEVR_train_scenes.json: No such file"),
        ([[1.0] * 2], "val", "got 2 objects in CLEVR_val_000000.png, expected 3 to 10"),
        (["abc"], "val", "got no scenes of CLEVR"),
    ],
)
def test_scenes_that_are_not_clevrs_are_said_on_one_line(tmp_path, depths, split, message):
    root = make_clevr(tmp_path, depths)
    with pytest.raises(SourceError, match=message) as error:
        open_source("clevr", root, split)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    return open_source(
        "imagefolder", make_folder(tmp_path, ["a/1.png", "a/2.png", "b/2.png", "b/3.png"])
    )


def test_a_subset_is_chosen_by_index_file_name_or_path(folder):
    assert select(folder, ["3\n", "0\n"]) == [0, 3]
    assert select(folder, ["# names", "", "3.png", "1.png", "1.png"]) == [0, 3]
    assert select(folder, ["b/2.png"]) == [2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["4"], "some.txt: got index 4, expected 0 to 3"),
        (["x.png", "1.png"], "some.txt: 1 of 2 names are not in the source, the first is 'x.png'"),
        (["2.png"], "got '2.png', expected one path: it may be a/2.png or b/2.png"),
        ([" ", "# none"], "some.txt: no entries"),
    ],
)
def test_a_subset_line_that_names_no_sample_is_an_error(folder, lines, message):
    with pytest.raises(SourceError, match=message):
        select(folder, lines, where="some.txt")


@pytest.mark.parametrize(
    ("name", "size"), [("imagenet_1percent.txt", 12_811), ("imagenet_10percent.txt", 128_116)]
)
def test_published_lists_of_imagenet_names_choose_their_images(data_folder, name, size):
    path = data_folder / "splits" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    lines = path.read_text().splitlines()
    names = sorted(f"{line.split('_')[0]}/{line}" for line in [*lines, "n01440764_none.JPEG"])
    chosen = select(Source(dict.fromkeys(range(len(names))), {}, names=names), lines)
    assert len(chosen) == size
    assert {names[index].split("/")[1] for index in chosen} == set(lines)


def test_a_published_list_of_cifar_indices_chooses_its_images(data_folder):
    path = data_folder / "splits" / "cifar10_4000labels_split152.txt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    chosen = select(Source(range(50_000), {}), path.read_text().splitlines())
    assert chosen == sorted(int(line) for line in path.read_text().split()) and len(chosen) == 4000


def test_names_are_refused_where_samples_have_none():
    with pytest.raises(SourceError, match="expected indices"):
        select(open_source("shapes", num_samples=5), ["1.png"])


def test_a_limit_is_spread_evenly_over_the_chosen_samples(folder):
    assert select(folder, limit=2) == [0, 2]
    assert select(folder, ["1", "2", "3"], limit=2) == [1, 2]
    assert select(folder, limit=9) == [0, 1, 2, 3]
    with pytest.raises(SourceError, match="limit: got 0"):
        select(folder, limit=0)
