"""Trains, resumes and evaluates a config.

python -m vlm_jax.main --config=configs/coca.py[:args] [--workdir=DIR] [--config.stages.pretrain.optim.lr=3e-4]

Exit codes: 0 done, 42 stopped by a signal and saved (the same command resumes), 43 bad config
or data, a loss that stayed non-finite, out of memory, or a process that did not come.
"""

from __future__ import annotations

import os
import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags

from vlm_jax import processes
from vlm_jax.errors import ConfigError

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/, with its arguments after a colon; "
                                         "override fields with --config.FIELD=VALUE.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "Work directory (default: runs/<config>[-<args>]).")
STAGE = flags.DEFINE_string("stage", "", "Run this stage alone (default: the config's stages in order).")
EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate the newest checkpoint and stop.")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile the train step, say what it needs of a device, and stop.")
TOPOLOGY = flags.DEFINE_string("topology", "", "With --compile_only: chips that need not be there, such as v5p:4x4x4, or v5e:16x16*2 for two slices.")
PLATFORM = flags.DEFINE_enum("platform", "", ["", "cpu", "gpu", "tpu"], "Where to run (default: the best that JAX finds).")

DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of this run (also where the environment tells of several).")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where JAX does not find it itself.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
RENDEZVOUS_TIMEOUT = flags.DEFINE_integer("rendezvous_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)

INSTALL = {"gpu": 'pip install -e ".[cuda]"', "tpu": 'pip install -e ".[tpu]"'}


def default_workdir(argv: list[str]) -> str:
    """runs/<config>[-<args>]."""
    return str(pathlib.Path("runs") / default_name(argv))


def default_name(argv: list[str]) -> str:
    """<config>[-<args>] from the --config flag as typed."""
    text = ""
    for i, arg in enumerate(argv):
        match = re.fullmatch(r"--?config(?:=(.*))?", arg)
        if match:
            text = match.group(1) if match.group(1) is not None else argv[i + 1]
    path, _, args = text.partition(":")
    tail = "-" + re.sub(r"[^A-Za-z0-9_.=-]+", "_", args) if args else ""
    return pathlib.Path(path).stem + tail


def accelerator_present() -> str:
    """"gpu" or "tpu" where the machine shows one, whatever JAX sees."""
    if pathlib.Path("/dev/nvidiactl").exists() or pathlib.Path("/proc/driver/nvidia/version").exists():
        return "gpu"
    if pathlib.Path("/dev/accel0").exists() or "TPU_WORKER_HOSTNAMES" in os.environ:
        return "tpu"
    return ""


def check_platform(wanted: str) -> None:
    """Starts JAX; raises ConfigError where it cannot start, or an accelerator would lie idle unnoticed."""
    import jax
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise ConfigError(f"--platform={wanted or 'default'}: JAX cannot start it: {error}") from error
    if jax.process_count() > 1:     # a slice of several TPU hosts is one even where nobody asked
        raise ConfigError(f"{jax.process_count()} processes found each other ({jax.device_count()} devices, {jax.local_device_count()} of them "
                          "here), but training over several processes is not there yet: use the devices of one host")
    present = accelerator_present()
    if found == "cpu" and present and wanted != "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise ConfigError(f"this machine has a {present.upper()}, but JAX sees only CPUs. Install its build: "
                          f"{INSTALL[present]}  (or train on the CPU with --platform=cpu)")
    if found == "cpu" and jax.device_count() > 1:
        # Virtual devices share one thread pool: two programs in flight can starve each other's collectives.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def join_processes() -> None:
    """Joins the other processes, where the flags or the environment ask for it. Raises ConfigError."""
    given = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    why = ("--distributed" if DISTRIBUTED.value else "") or ("--coordinator" if given != ("", None, None) else "") or processes.found(os.environ)
    if not why:
        return
    processes.join(*given, timeout=RENDEZVOUS_TIMEOUT.value, why=why)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-help", "-h", "--helpfull"} & set(argv):
        print(__doc__.strip(), "", FLAGS.main_module_help(), sep="\n")
        return 0
    try:
        try:
            rest = FLAGS(argv)
            config = CONFIG.value
            getattr(config, "stages", None)      # a file that did not load says so on first use
            if config is None:
                raise ConfigError("--config is missing; start with --config=configs/coca.py")
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise ConfigError(explain(error)) from error
        if rest[1:]:
            raise ConfigError(f"argument {rest[1]!r} is not a flag")
        if TOPOLOGY.value and not COMPILE_ONLY.value:
            raise ConfigError(f"--topology={TOPOLOGY.value} has no use without --compile_only")
        if TOPOLOGY.value:      # nothing here is used, least of all a chip that another program holds
            os.environ["JAX_PLATFORMS"] = "cpu"
            from vlm_jax import forecast
            forecast.compile_only(config, TOPOLOGY.value, name=default_name(argv), only=STAGE.value)
            return 0
        if PLATFORM.value:
            os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(PLATFORM.value, PLATFORM.value)
        join_processes()
        check_platform(PLATFORM.value)
        if COMPILE_ONLY.value:
            from vlm_jax import forecast
            forecast.compile_only(config, name=default_name(argv), only=STAGE.value)
            return 0
        from vlm_jax import run
        return run.run(config, WORKDIR.value or default_workdir(argv), only=STAGE.value, eval_only=EVAL_ONLY.value)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 43
    except Exception as error:
        if type(error).__name__ == "NonFiniteError":     # by name: its module imports jax
            print(f"error: {error}", file=sys.stderr)
            return 43
        raise


def explain(error: BaseException) -> str:
    """The line that helps, of what absl and ml_collections say around a config file's own error."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    told = re.findall(r"ConfigError: (.*)", text)     # a config file's traceback is part of their message
    text = told[-1] if told else text.split("The above exception")[0].split("Traceback (most recent call last)")[0]
    return " ".join(text.replace("\\n", " ").replace("\\'", "'").strip("'\"").split())


if __name__ == "__main__":
    sys.exit(main())
