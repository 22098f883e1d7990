"""Every test runs on the CPU, on 8 virtual devices, without the network, sharing one compilation cache."""

import importlib.util
import mmap
import os
import pathlib
import sys
import tempfile

# Compiling is most of the time of tests this small: these compile in a third of it, into slower code.
QUICK_TO_COMPILE = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def known_to_xla(flag):
    """XLA ends the process at a flag that it does not know, and its flags come and go with the version."""
    name = flag.removeprefix("--").partition("=")[0].encode() + b"\0"
    for library in pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent.glob("libjax_common.*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(name) >= 0
    return False


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
                                    *filter(known_to_xla, QUICK_TO_COMPILE)])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR",
                      str(pathlib.Path(tempfile.gettempdir()) / f"vlm_jax_test_cache_{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# A file runs on one worker: the long ones first, so that no worker ends alone with one of them.
LONGEST = ("test_run", "test_finetune", "test_step", "test_parity", "test_blip", "test_importers", "test_importers_hub", "test_albef", "test_load", "test_claims",
           "test_own_data", "test_systems", "test_provenance", "test_notebook", "test_probe", "test_memory", "test_losses")


def pytest_collection_modifyitems(items):
    names = [item.path.stem for item in items]
    order = sorted(range(len(items)), key=lambda i: LONGEST.index(names[i]) if names[i] in LONGEST else len(LONGEST))
    items[:] = [items[i] for i in order]
