"""Trains, resumes and evaluates a config.

python -m vlm_jax.main --config=configs/coca.py[:args] [--workdir=DIR] [--config.stages.pretrain.optim.lr=3e-4]

Exit codes: 0 done, 42 stopped by a signal and saved (the same command resumes), 43 bad config
or data, a loss that stayed non-finite, out of memory, or a process that did not come, 44 a process
that is gone or stuck (the same command resumes).
"""

from __future__ import annotations

import os
import pathlib
import re
import sys
import time
import traceback

from absl import flags
from ml_collections import config_flags

from vlm_jax import processes
from vlm_jax.errors import ConfigError, nearest

STARTED = time.time()
FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/, with its arguments after a colon; "
                                         "override fields with --config.FIELD=VALUE.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "Work directory (default: runs/<config>[-<args>]).")
STAGE = flags.DEFINE_string("stage", "", "Run this stage alone (default: the config's stages in order).")
EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate the newest checkpoint and stop.")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile the train step, say what it needs of a device, and stop.")
TOPOLOGY = flags.DEFINE_string("topology", "", "With --compile_only: chips that need not be there, such as v5p:4x4x4, or v5e:16x16*2 for two slices.")
PLATFORM = flags.DEFINE_enum("platform", "", ["", "cpu", "gpu", "tpu"], "Where to run (default: the best that JAX finds).")

PROFILE = flags.DEFINE_string("profile", "", "Trace these steps into the stage's profile/ folder, for xprof: FIRST-LAST, or how many after the third.")

DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of this run (also where the environment tells of several).")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where JAX does not find it itself.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
RENDEZVOUS_TIMEOUT = flags.DEFINE_integer("rendezvous_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
HANG_TIMEOUT = flags.DEFINE_float("hang_timeout", None, "Seconds without a sign of life of a process, or without anything happening in training, after "
                                  "which all print their stacks and end with 44 (default: 60 for several processes, never for one).", lower_bound=1)

INSTALL = {"gpu": 'pip install -e ".[cuda]"', "tpu": 'pip install -e ".[tpu]"'}


def default_workdir(argv: list[str]) -> str:
    """runs/<config>[-<args>]."""
    return str(pathlib.Path("runs") / default_name(argv))


def default_name(argv: list[str]) -> str:
    """<config>[-<args>] from the --config flag as typed."""
    path, _, args = typed_config(argv).partition(":")
    tail = "-" + re.sub(r"[^A-Za-z0-9_.=-]+", "_", args) if args else ""
    return pathlib.Path(path).stem + tail


def typed_config(argv: list[str]) -> str:
    """The value of the last --config flag, "" without one."""
    text = ""
    for i, arg in enumerate(argv):
        match = re.fullmatch(r"--?config(?:=(.*))?", arg)
        if match:
            text = match.group(1) if match.group(1) is not None else "".join(argv[i + 1:i + 2])
    return text


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
    processes.check(*given)
    here = processes.found(os.environ) if given == ("", None, None) else processes.Found("--coordinator", *given)
    if not here.why and not DISTRIBUTED.value:
        return
    processes.supervise(here.coordinator)
    processes.join(here.coordinator, here.count, here.index, timeout=RENDEZVOUS_TIMEOUT.value, why=here.why or "--distributed", devices=here.devices)


def watch() -> processes.Watchdog | None:
    """The watchdog where there are several processes, or it was asked for."""
    import jax
    if jax.process_count() == 1 and HANG_TIMEOUT.value is None:
        return None
    return processes.watch(HANG_TIMEOUT.value or 60.0)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-help", "-h", "--helpfull"} & set(argv):
        print(__doc__.strip(), "", FLAGS.main_module_help(), sep="\n")
        return 0
    watchdog = None
    try:
        try:
            rest = FLAGS(argv)
            config = CONFIG.value
            getattr(config, "stages", None)      # a file that did not load says so on first use
            if config is None:
                raise ConfigError("--config is missing; start with --config=configs/coca.py")
        except Exception as error:      # a config file may raise anything
            raise ConfigError(no_file(argv) or no_field(error, argv) or explain(error, typed_config(argv).partition(":")[0])) from error
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
        watchdog = watch()
        from vlm_jax import run
        code, said = run.run(config, WORKDIR.value or default_workdir(argv), only=STAGE.value, eval_only=EVAL_ONLY.value, watchdog=watchdog,
                             began=STARTED, profile=PROFILE.value), ""
    except Exception as error:
        code, said = 1, f"{type(error).__name__}: {error}"
        if isinstance(error, ConfigError) or type(error).__name__ == "NonFiniteError":     # by name: its module imports jax
            code, said = 43, str(error)
            print(f"error: {error}", file=sys.stderr)
        elif watchdog is None:
            raise
        else:
            traceback.print_exc()
            sys.stderr.flush()
            watchdog.blame(error)
    if watchdog is not None:
        watchdog.leave(code, said)
    return code


def no_field(error: BaseException, argv: list[str]) -> str:
    """What to say of --config.FIELD=VALUE where the config has no such field, "" of other errors: ml_collections tells the last name alone."""
    name = re.match(r"\W*(\w+)", str(error))
    if not isinstance(error, (KeyError, AttributeError)) or not name:
        return ""
    typed = [m[1] for arg in argv if (m := re.match(r"--?config\.([\w.\[\]]+)", arg)) and name[1] in re.split(r"\W+", m[1])]
    near = re.search(r'Did you mean "(\w+)"', str(error))
    return typed and (f"--config.{typed[0]}: the config has no field {name[1]!r}" + (f"; nearest: {near[1]!r}" if near else
                      ": what a config file leaves to its default is set there, not on the command line")) or ""


def no_file(argv: list[str]) -> str:
    """What to say of a --config that is no file, "" of one that is."""
    path = pathlib.Path(typed_config(argv).partition(":")[0])
    if not path.name or path.is_file():
        return ""
    return f"--config={path}: there is no such file{nearest(path, sorted(map(str, pathlib.Path('configs').glob('*.py'))))}"


def explain(error: BaseException, path: str) -> str:
    """The line that helps, of what absl and ml_collections say around the error of a config file, ``path``, whose traceback they may tell."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    before, traced, _ = text.partition("Traceback (most recent call last)")
    if told := re.findall(r"ConfigError: (.*)", text):
        text = told[-1]
    elif traced or any(path and frame.filename.endswith(path) for frame in traceback.extract_tb(error.__traceback__)) or isinstance(error, SyntaxError):
        trace = text if traced else "".join(traceback.format_exception(error))
        blocks = [block for block in re.split(r"\n(?:The above|During handling of the above) exception .*\n", trace) if f'{path}", line' in block]
        frames, raised = re.fullmatch(r'(.*File "[^\n]*)\n(.*)', blocks[-1] if blocks else trace, re.DOTALL).groups()
        own = [f"{path}, line {line}: " for line in re.findall(rf'{re.escape(path)}", line (\d+)', frames)]
        what = re.search(r"^[A-Za-z_][\w.]*(:.*)?$", raised, re.MULTILINE)
        text = before.replace("Error whilst parsing config file:", "") * bool(traced) + "".join(own[-1:]) + (what[0] if what else raised)
    text = " ".join(text.replace("\\n", " ").replace("\\'", "'").split())
    return text[1:-1] if text[:1] == text[-1:] and text[:1] in "'\"" else text


if __name__ == "__main__":
    sys.exit(main())
