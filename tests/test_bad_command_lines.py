"""Every command answers a bad command line with one line on stderr and exit code 2.

In this process, through each command's `main`; the lines name files of one folder: a dataset
`a.beton`, a run's folder `run`, and what is neither.
"""

import os

import numpy as np
import pytest
from support.evaluations import write_run
from support.tuning_files import write_coloured

import demo
import evaluate
import train
import write_dataset
from ffcv_ssl import inspect
from ffcv_ssl.jobs import chain
from pipelines import __main__ as pipelines_command

FILES = {
    "empty": "",
    "text.txt": "hello\n",
    "latin.yaml": b"\xff\xfe\xe9: 1\n",
    "list.yaml": "- 1\n- 2\n",
    "bad.yaml": "a: [1,\n b: }\n",
    "nul.yaml": b"epochs: \x00\n",
    "tag.yaml": "epochs: !!python/object:os.system x\n",
    "twice.yaml": "epochs: 1\nepochs: 2\n",
    "group.yaml": "data: null\n",
    "number.yaml": "1: 2\n",
    "no_views.yaml": "views: {view_0: [1]}\n",
    "no_stages.yaml": "stages: [a]\n",
    "no_command.yaml": "stages: {a: {config: x.yaml}}\n",
    "suite_key.yaml": "- {name: a, train: a.beton, val: a.beton, x: 1}\n",
    "suite_val.yaml": "- {name: a}\n",
    "batch_key.yaml": "- {config: a.yaml, x: 1}\n",
    "batch_file.yaml": "- {name: 1}\n",
    "batch.yaml": "- epochs.yaml\n",
    "epochs.yaml": "epochs: 3\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with all these files."""
    made = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (made / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_coloured(made / "a.beton", np.arange(40) % 4)
    write_coloured(made / "b.beton", np.arange(44) % 4)
    write_run(made / "run", made / "a.beton", made / "b.beton")
    (made / "folder").mkdir()
    (made / "images/train/cat").mkdir(parents=True)
    (made / "images/train/cat/a.jpg").write_text("not an image")
    (made / "no_images/train").mkdir(parents=True)
    os.symlink("loop", made / "loop")
    return made


@pytest.fixture
def answer(folder, monkeypatch, capsys):
    """answer(main, words): the only line on stderr of a command that ends with exit code 2."""

    def ask(main, words):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("ffcv_ssl.config.renamed.say_once", lambda line: None)
        try:
            code = main(words)
        except SystemExit as end:  # as argparse ends a command
            code = end.code
        assert code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return ask


TRAIN_WITH = (
    "--data.train=a.beton --epochs=2 --optim.warmup_epochs=0 --system.device=cpu --out=folder/run"
)
TRAIN = [
    ("--epochs=nan", "epochs: got 'nan', expected a whole number above 0"),
    ("--epochs=-1", "epochs: got -1, expected a whole number above 0"),
    ("--epochs=1e999", "epochs: got inf, expected a whole number above 0"),
    ("--epochs=", "epochs: got nothing, expected a whole number above 0"),
    ("--seed=-1", "seed: got -1, expected a whole number of at least 0"),
    ("--evaluation.resolution=70000", "evaluation.resolution: got 70000, expected at most 65535"),
    (
        "--resolution.max=70000",
        "resolution.max: got 70000, expected at most 65535",
    ),
    (
        "--data.batch_size=99999999999999999999",
        "a.beton: got 40 samples, expected at least one batch of",
    ),
    ("--optim.lr=nan", "optim.lr: got 'nan', expected a number above 0"),
    ("--optim.lr=1e400", "optim.lr: got inf, expected"),
    ("--optim.betas=1", "optim.betas: got 1, expected a list of 2, each a number"),
    ("--optim.warmup_epochs=99", "optim.warmup_epochs: got 99.0, expected less than epochs (2)"),
    (f"--optim.lr=1{'0' * 5000}", "optim.lr"),
    (
        "--system.patience_minutes=1e13",
        "system.patience_minutes: got 10000000000000.0, expected a number above 0 and of at most",
    ),
    ("--optim.nothing=1", "optim: unknown key 'nothing'"),
    ("--data=3", "data: got 3, expected a mapping of settings"),
    ("--data.train=", "data.train or data.val: no file ''; write one with write_dataset.py"),
    (
        "--data.train=none.beton",
        "data.train or data.val: no file 'none.beton'; write one with write_dataset.py",
    ),
    (
        "--data.train=folder",
        "no file 'folder'; write one with write_dataset.py --source imagefolder --root folder "
        "--out train.beton, and give --data.train FILE.beton; --data.val FILE.beton, or "
        "--data.val null for no evaluation",
    ),
    (
        "--resolution.max=32",
        "end_ramp 0, expected min <= max and start_ramp <= end_ramp; give --re",
    ),
    ("--views.recipe=supervised", "expected 2 to 12 for SimCLR; give --views.recipe simclr"),
    ("--data.batch_size=1", "labelled.unsupervised_batch_size: --data.batch_size 2"),
    (
        "--data.batch_size=41",
        "a.beton: got 40 samples, expected at least one batch of 41; give --d",
    ),
    (
        "--data.train=text.txt",
        "text.txt: header needs 24 bytes at 0, the file has 6; truncated or damaged",
    ),
    (
        "--data.train=loop",
        "data.train or data.val: no file 'loop'; write one with write_dataset.py",
    ),
    (
        "--data.label_field=x --labelled.loss=suncet --labelled.labels.fraction=0.5",
        "a.beton: no labels in field 'x', but method simclr with labelled.loss suncet needs them",
    ),
    ("--data.image_field=label", "a.beton: no image field 'label'; the file has: image, label"),
    ("--data.num_workers=-5", "data.num_workers: got -5, expected a whole number of at least -1"),
    ("--model.projector=a-b", "model.projector: got 'a-b', expected widths such as 2048-512"),
    ("--model.backbone=x", "model.backbone: got 'x', expected one of"),
    ("--method=x", "method: got 'x', expected one of"),
    (
        "--method=none.py:X",
        "method: no file 'none.py'; expected path/to/file.py:Class, or package.module:Class",
    ),
    ("--views.recipe=x", "views.recipe: got 'x', expected one of"),
    ("--views.view_0.blur_prob=2", "views.view_0.blur_prob: got 2, expected 0 to 1"),
    (
        "--views.view_9.blur_prob=0",
        "views.view_9: recipe 'simclr' has no such view, expected one of view_0, view_1",
    ),
    ("--views.view_0.extra_ops=3", "extra_ops: got 3, expected a list, each a mapping"),
    (
        "--views.view_0.crop=center --resolution.min=8",
        "views.view_0.crop: got center, expected random where resolution.min is below "
        "resolution.max; make them equal",
    ),
    ("--system.device=tpu", "system.device: got 'tpu', expected auto, cpu, cuda or cuda:N"),
    (
        "--system.device=cuda:99",
        "system.device: got cuda:99, but there is no such device here; use cpu",
    ),
    ("--out=text.txt", "text.txt: cannot be the run's folder (File exists)"),
    ("--config=none.yaml", "none.yaml: no such configuration file"),
    ("--config=folder", "folder: no such configuration file"),
    ("--config=", "--config: got nothing, expected a YAML file"),
    ("--config=empty", "empty: got nothing, expected a mapping of settings"),
    ("--config=list.yaml", "list.yaml: got a list, expected a mapping of settings"),
    ("--config=bad.yaml", "bad.yaml: line 2: expected the node content, but found"),
    ("--config=latin.yaml", "latin.yaml: got bytes that are not UTF-8, expected YAML"),
    ("--config=nul.yaml", "nul.yaml: unacceptable character #x0000: special characters are not"),
    ("--config=tag.yaml", "tag.yaml: line 1: could not determine a constructor for the tag"),
    ("--config=twice.yaml", "twice.yaml: line 2: key 'epochs' is given twice"),
    ("--config=number.yaml", "number.yaml: unknown key '1'"),
    ("--config=group.yaml", "group.yaml: data: got None, expected a mapping of settings"),
    ("--config=no_views.yaml", "views.view_0: got [1], expected a mapping of settings"),
    (
        "--labelled.loss=suncet --labelled.labels.fraction=5",
        "labelled.labels.fraction: got 5, expected above 0, at most 1",
    ),
    (
        "--labelled.loss=suncet --labelled.labels.scheme=file --labelled.labels.file=none",
        "labelled.labels.file: none: No such file or directory",
    ),
    (
        "--labelled.loss=suncet --labelled.labels.scheme=file --labelled.labels.file=latin.yaml",
        "labelled.labels.file: latin.yaml: not a text file",
    ),
    (
        "--labelled.loss=suncet --labelled.labels.scheme=file --labelled.labels.file=empty",
        "labelled.labels.file: empty: no entries, expected one sample per line",
    ),
    (
        "--labelled.supervised_epochs=1 --labelled.supervised_passes=2",
        "labelled: got supervised_epochs 1.0 and supervised_passes 2.0, expected one of them",
    ),
    (
        "--checkpoint.every_minutes=nan",
        "checkpoint.every_minutes: got 'nan', expected a number above 0",
    ),
    ("--slurm.batch=batch_key.yaml", "batch_key.yaml: entry 1: unknown key 'x'"),
    (
        "--slurm.batch=batch_file.yaml",
        "batch_file.yaml: entry 1: got {'name': 1}, expected a file or {config, name, overrides}",
    ),
    (
        "--slurm.batch=batch.yaml --config=epochs.yaml",
        "batch.yaml: got --config too, expected it in the list's entries",
    ),
    (
        "--slurm.time=soon",
        "slurm.time: got 'soon', expected minutes, hours:minutes:seconds or days-hours",
    ),
    ("word", "unknown key 'word'"),
]


CHECKPOINT = "--checkpoint=run --out=folder/results --data.num_workers=1"
EVALUATIONS = [
    ("", "protocol: got '', expected one of"),
    ("nothing", "protocol: got 'nothing', expected one of"),
    ("linear", "checkpoint: got none, expected --checkpoint RUN or FILE"),
    ("linear word", "word: got no key before it, expected --key word"),
    ("linear --checkpoint=", "checkpoint: got none, expected --checkpoint RUN or FILE"),
    (
        "linear --checkpoint=none",
        "checkpoint: no file or folder 'none'; give a run's folder or file",
    ),
    (
        "linear --checkpoint=folder",
        "folder: not a run's folder: no checkpoint.pt, backbone.safetensors or finetuned",
    ),
    ("linear --checkpoint=text.txt", "text.txt: not a readable checkpoint ("),
    ("linear --checkpoint=empty", "empty: not a readable checkpoint ("),
    ("linear --nothing=1", "unknown key 'nothing'"),
    (f"linear {CHECKPOINT} --lrs=[]", "lrs: got an empty list, expected one value at least"),
    (f"linear {CHECKPOINT} --lrs=nan", "lrs: got ['nan'], expected a list, each a number above 0"),
    (f"linear {CHECKPOINT} --momentum=1", "momentum: got 1, expected below 1"),
    (f"linear {CHECKPOINT} --data.train=none", "no file 'none'"),
    (
        f"linear {CHECKPOINT} --data.resolution_px=99999999",
        "data.resolution_px: got 99999999, expected",
    ),
    (f"linear {CHECKPOINT} --data.center_ratio=2", "data.center_ratio: got 2, expected at most 1"),
    (
        f"linear {CHECKPOINT} --labels.fraction=5",
        "labels.fraction: got 5, expected above 0, at most 1",
    ),
    (
        f"linear {CHECKPOINT} --depths=x",
        "depths: got 'x', but run has no such depth; expected one of backbone, projector_1",
    ),
    (
        f"linear {CHECKPOINT} --system.profile=3",
        "system.profile: got 3, but linear trains no network; leave it out",
    ),
    (f"knn {CHECKPOINT} --ks=0", "ks: got [0], expected a list, each a whole number above 0"),
    (f"knn {CHECKPOINT} --ks", "ks: got an empty list, expected one value at least"),
    (
        f"knn {CHECKPOINT} --ks=1000",
        "ks: got 1000, but the bank has 40 images; give smaller --ks or more labels",
    ),
    (
        f"knn {CHECKPOINT} --temperatures=nan",
        "temperatures: got ['nan'], expected a list, each a number",
    ),
    (
        f"snn {CHECKPOINT} --temperatures=[]",
        "temperatures: got an empty list, expected one value at least",
    ),
    ("finetune --checkpoint=run --out=run", "a pretraining run's folder; use another --out"),
    (
        "finetune --checkpoint=run --out=o --optim.warmup_epochs=99 --epochs=2",
        "optim.warmup_epochs: got 99, expected less than epochs (2)",
    ),
    (
        "finetune --checkpoint=run --out=o --optim.clip_norm=1",
        "optim.clip_norm: got 1, expected 0 here",
    ),
    ("transfer --checkpoint=run --out=o --momentum=1", "momentum: got 1, expected below 1"),
    (
        "transfer --checkpoint=run --out=o --grid.lrs=[1,1]",
        "grid.lrs: got [1.0, 1.0], expected one or more different values",
    ),
    ("export", "checkpoint: got none, expected --checkpoint RUN or FILE"),
    (
        "export --checkpoint=run --out=text.txt/a",
        "text.txt/a: cannot be made (Not a directory); use another --out",
    ),
    ("curve", "checkpoint: got none, expected --checkpoint RUN RUN ... or files"),
    ("curve --checkpoint=run --protocol=x", "protocol: got 'x', expected one of"),
    (
        "curve --protocol=online --checkpoint=run --settings.ks=1",
        "settings: protocol online has none; choose another --protocol",
    ),
    (
        "curve --protocol=online --checkpoint=run",
        "no evaluations in its metrics; choose another --protocol",
    ),
    ("seeds", "checkpoint: got none, expected --checkpoint RUN RUN ..."),
    ("seeds --checkpoint=run", "run: no results.jsonl with results; evaluate something there"),
    ("suite", "checkpoint: got none, expected --checkpoint RUN or FILE ..."),
    (
        "suite --checkpoint=run --protocols=[]",
        "protocols: got an empty list, expected linear, mlp, knn or snn",
    ),
    ("suite --checkpoint=run", "suite: got none, expected --suite configs/suites/NAME.yaml"),
    ("suite --checkpoint=run --suite=none", "none: cannot be read (No such file or directory)"),
    (
        "suite --checkpoint=run --suite=epochs.yaml",
        "epochs.yaml: expected a list of {name, train, val, ...}",
    ),
    (
        "suite --checkpoint=run --suite=suite_key.yaml",
        "suite_key.yaml: entry 1: data: unknown key 'x'",
    ),
    (
        "suite --checkpoint=run --suite=suite_val.yaml",
        "suite_val.yaml: entry 1: got {'name': 'a'}, expected a mapping with name, train and val",
    ),
    ("table", "checkpoint: got none, expected --checkpoint RUN RUN ..."),
    ("table --checkpoint=run", "run: no results.jsonl with results; evaluate something there"),
    ("linear --slurm.batch=none", "none: cannot be read (No such file or directory)"),
]


SHAPES = "--source=shapes --num_samples=4 --out=folder/o.beton"
FOLDER = "--source=imagefolder --out=folder/o.beton"
DATASETS = [
    ("", "write_dataset.py: the following arguments are required: --source, --out; see --help"),
    ("--source=x --out=o", "write_dataset.py: --source: unknown source 'x', expected shapes, "),
    (
        f"{SHAPES} --out=folder",
        "--out: got 'folder', expected a file to write, such as train.beton",
    ),
    (
        f"{SHAPES} --out=text.txt/o",
        "text.txt: cannot be written to (File exists); use another --out",
    ),
    (f"{SHAPES} --out=", "--out: got '', expected a file to write, such as train.beton"),
    (f"{SHAPES} --num_samples=0", "shapes: num_samples: got 0, expected at least 1"),
    (
        f"{SHAPES} --num_samples=nan",
        "argument --num_samples: got 'nan', expected a whole number of at least 0",
    ),
    (
        f"{SHAPES} --num_samples=-1",
        "argument --num_samples: got '-1', expected a whole number of at least 0",
    ),
    (f"{SHAPES} --size_px=4", "shapes: size_px: got 4, expected 8 to 4096"),
    (f"{SHAPES} --seed=x", "argument --seed: invalid int value: 'x'; see --help"),
    (f"{SHAPES} --quality=0", "jpeg_quality: got 0, expected 1 to 100"),
    (f"{SHAPES} --max_resolution=99999999", "max_resolution: got 99999999, expected 1 to 65535"),
    (f"{SHAPES} --mode=x", "argument --mode: invalid choice: 'x'"),
    (f"{SHAPES} --limit=0", "limit: got 0, expected at least 1"),
    (f"{SHAPES} --subset=none", "--subset: none: No such file or directory"),
    (
        f"{SHAPES} --subset=folder",
        "--subset: folder: is a folder, expected a regular file; remove or rename it",
    ),
    (f"{SHAPES} --subset=latin.yaml", "--subset: latin.yaml: not a text file"),
    (f"{SHAPES} --subset=empty", "empty: no entries, expected one sample per line"),
    (
        f"{SHAPES} --subset=text.txt",
        "got 'hello', expected indices, as the samples of this source have no names",
    ),
    (f"{SHAPES} --root=folder", "--root: source 'shapes' has no such setting"),
    (f"{SHAPES} --nothing=1", "unrecognized arguments: --nothing=1; see --help"),
    (FOLDER, "--root: missing, expected the folder of images"),
    (f"{FOLDER} --root=none", "--root: none: no such folder"),
    (f"{FOLDER} --root=text.txt", "--root: text.txt: no such folder"),
    (f"{FOLDER} --root=no_images", "train: no image files, expected some ending in"),
    (f"{FOLDER} --root=images", "cat/a.jpg, field 'image': not a readable image ("),
    (f"{FOLDER} --root=images --split=x", "--split: images/x: no such folder, images has train"),
    ("--source=cifar10 --out=o", "--root: missing, expected the folder that cifar10 lies in"),
    (
        "--source=clevr --out=o --root=none",
        "expected CLEVR_v1.0 with the folders images and scenes",
    ),
    (
        "--source=clevr --out=o --root=none --split=test",
        "--split: got 'test', expected train or val, which have labels",
    ),
]


PICTURE = "simclr --beton=a.beton --out=folder/views.png"
PICTURES = [
    ("simclr", "pipelines: beton: got none, expected --beton FILE.beton"),
    ("simclr byol --beton=a.beton", "recipe: got simclr and byol, expected one recipe"),
    ("x --beton=a.beton", "recipe: got 'x', expected one of"),
    ("simclr --beton=none", "none: No such file or directory"),
    ("simclr --beton=folder", "folder: not a regular file"),
    ("simclr --beton=text.txt", "text.txt: header needs 24 bytes"),
    (f"{PICTURE} --images=0", "images: got 0, expected a whole number above 0"),
    (f"{PICTURE} --samples=nan", "samples: got 'nan', expected a whole number above 0"),
    (f"{PICTURE} --size=99999999", "size: got 99999999, expected a whole number of at least 0 and"),
    (f"{PICTURE} --seed=-1", "seed: got -1, expected a whole number of at least 0"),
    (f"{PICTURE} --nothing=1", "unknown key 'nothing'"),
    (f"{PICTURE} --view_0.blur_prob=nan", "view_0.blur_prob: got 'nan', expected a number"),
    (f"{PICTURE} --view_0.nothing=1", "view_0: unknown key 'nothing'"),
    (f"{PICTURE} --view_0.crop_scale=[0,0]", "expected low <= high and high above 0"),
    (
        f"{PICTURE} --view_0.crop_scale=1",
        "view_0.crop_scale: got 1, expected a list of 2, each a number",
    ),
    (f"{PICTURE} --out=folder", "out: got 'folder', expected a file to write, such as views.png"),
    (f"{PICTURE} --out=text.txt/x.png", "text.txt: File exists"),
    (f"{PICTURE} --out=folder/v.nothing", "Format 'nothing' is not supported (supported formats: "),
]


FILES_TO_INSPECT = [
    ("", "the following arguments are required: file; see --help"),
    ("none", "none: cannot be opened (No such file or directory)"),
    ("folder", "folder: not a regular file"),
    ("empty", "empty: header needs 24 bytes at 0, the file has 0; truncated or damaged file"),
    ("text.txt/x", "text.txt/x: cannot be opened (Not a directory)"),
    ("loop", "loop: cannot be opened (Too many levels of symbolic links)"),
    ("/proc/self/mem", "/proc/self/mem: header needs 24 bytes"),
    ("a.beton b.beton", "unrecognized arguments: b.beton; see --help"),
    ("a.beton --grid=", "--grid: got '', expected a file to write, such as grid.png"),
    ("a.beton --grid=folder", "--grid: got 'folder', expected a file to write, such as grid.png"),
    (
        "a.beton --grid=text.txt/x.png",
        "text.txt/x.png: picture cannot be written (Not a directory); use another --grid",
    ),
]


DEMOS = [
    ("word", "unrecognized arguments: word; see --help"),
    ("--out={folder}/text.txt", "text.txt: cannot be made (Not a directory); use another --out"),
    (
        "--out={folder}/text.txt/x",
        "text.txt/x: cannot be made (Not a directory); use another --out",
    ),
    ("--out={folder}/images", "images: holds files that are not the demo's; use another --out"),
    ("--out=" + "x" * 300, "cannot be made (File name too long); use another --out"),
]


CHAINS = [
    ("", "got no chain, expected a YAML file: python -m ffcv_ssl.jobs.chain CHAIN.yaml"),
    ("none", "none: no such configuration file"),
    ("list.yaml", "list.yaml: got a list, expected a mapping of settings"),
    ("epochs.yaml", "epochs.yaml: unknown key 'epochs'"),
    ("no_stages.yaml", "no_stages.yaml: stages: got ['a'], expected a mapping of settings"),
    ("no_command.yaml", "stages.a.command: got none, expected train, finetune, snn..."),
    ("no_command.yaml word", "got 'word', expected --out, --STAGE.KEY, --all.KEY or --slurm.KEY"),
    (
        "no_command.yaml --x.y=1",
        "no_command.yaml: --x: no such stage, expected out, all, slurm or a stage: a",
    ),
]


COMMANDS = (
    (train.main, TRAIN),
    (evaluate.main, EVALUATIONS),
    (write_dataset.main, DATASETS),
    (pipelines_command.main, PICTURES),
    (inspect.main, FILES_TO_INSPECT),
    (demo.main, DEMOS),
    (chain.main, CHAINS),
)
CASES = [
    pytest.param(main, words, said, id=f"{main.__module__} {words}"[:120])
    for main, lines in COMMANDS
    for words, said in lines
]


@pytest.mark.parametrize("main, words, said", CASES)
def test_a_command_refuses_a_bad_command_line_in_one_line(answer, folder, main, words, said):
    given = TRAIN_WITH.split() if main is train.main else []
    assert said in answer(main, [*given, *words.replace("{folder}", str(folder)).split()])
