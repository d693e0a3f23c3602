"""Manners: threads end, processes end, nothing of the process is changed, start-up is quick."""

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from support.loading import make_loader, samples_of
from support.small_files import REPOSITORY


def run_python(code, *arguments, timeout=120, **environment):
    """A fresh interpreter; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=REPOSITORY / "tests",
        env={**os.environ, **environment},
    )


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("ffcv_ssl")]


def test_threads_end_with_close_with_and_garbage_collection(small_beton):
    before = len(loader_threads())
    loader = make_loader(small_beton)
    next(iter(loader))
    assert len(loader_threads()) == before + 2
    loader.close()
    with make_loader(small_beton) as loader:
        next(iter(loader))
    loader = make_loader(small_beton)
    next(iter(loader))
    del loader
    assert len(loader_threads()) == before


@pytest.mark.whole
def test_an_interpreter_ends_with_a_loader_in_the_middle_of_an_epoch(small_beton):
    code = """
        import sys
        from support.loading import make_loader
        loader = make_loader(sys.argv[1], 8, batches_ahead=3)
        iterator = iter(loader)
        next(iterator)
        print("ending")
    """
    done = run_python(code, small_beton)
    assert (done.returncode, done.stdout.strip()) == (0, "ending")
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr


@pytest.mark.whole
def test_an_interrupt_ends_the_process(small_beton):
    code = """
        import os, signal, sys, threading
        from support.loading import make_loader
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        loader = make_loader(sys.argv[1], 4)
        while True:
            for batch in loader:
                pass
    """
    done = run_python(code, small_beton)
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr


def test_the_process_is_left_as_it_was(small_beton):
    threads, environment = torch.get_num_threads(), dict(os.environ)
    state = np.random.get_state()[1].copy(), torch.get_rng_state().clone()
    with make_loader(small_beton) as loader:
        list(loader)
    assert torch.get_num_threads() == threads and dict(os.environ) == environment
    assert (np.random.get_state()[1] == state[0]).all()
    assert torch.get_rng_state().equal(state[1])


def test_two_loaders_and_a_torch_dataloader_live_side_by_side(small_beton, raw_beton):
    other = torch.utils.data.DataLoader(range(40), batch_size=4, num_workers=1)
    with make_loader(small_beton) as one, make_loader(raw_beton, 8) as two:
        alone = samples_of(one), samples_of(two)
        one.set_epoch(0)
        two.set_epoch(0)
        together = list(zip(one, two, other))
    count = len(together)
    assert count == 6
    assert samples_of(t[0] for t in together) == alone[0]
    assert samples_of(t[1] for t in together) == alone[1][: 8 * count]


@pytest.mark.whole
def test_a_fork_of_a_process_with_a_loader_gets_an_error_and_no_hang(small_beton):
    code = """
        import os, sys
        from support.loading import make_loader
        iterator = iter(make_loader(sys.argv[1], 4))
        next(iterator)
        child = os.fork()
        if child == 0:
            try:
                next(iterator)
            except RuntimeError as error:
                os._exit(7 if "fork" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    done = run_python(code, small_beton)
    assert done.returncode == 0, done.stderr


@pytest.mark.whole
def test_importing_the_package_or_reading_a_command_loads_neither_torchvision_nor_plotting():
    code = """
        import sys
        slow = ("torchvision", "torch._dynamo", "plotly", "matplotlib")
        import ffcv_ssl
        from ffcv_ssl import Loader, DatasetWriter, Reader
        print([m for m in slow if m in sys.modules])
        sys.path.insert(0, "..")
        import train, evaluate, write_dataset
        train.read_config(["--model.backbone=resnet18", "--data.train=a.beton"])
        print([m for m in slow if m in sys.modules])
    """
    assert run_python(code).stdout.split() == ["[]", "[]"]


@pytest.mark.whole
def test_a_second_process_compiles_nothing(small_beton, tmp_path):
    code = """
        import sys
        from support.loading import make_loader
        with make_loader(sys.argv[1]) as loader:
            next(iter(loader))
        from ffcv_ssl.kernels import io, random
        from ffcv_ssl.pipeline import dispatch
        built_in = dispatch.BUILT_IN
        kernels = (io.read_samples, random.shuffle_, built_in.draw_view, built_in.render_view)
        print(sum(sum(k.dispatcher.stats.cache_misses.values()) for k in kernels))
    """
    assert run_python(code, small_beton).returncode == 0
    assert run_python(code, small_beton).stdout.strip() == "0"
