"""Runs one config: `python -m opd_jax.main --config=configs/x.py[:form] --workdir=DIR`.

Any key can be changed on the command line: --config.optimizer.learning_rate=3e-5
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import socket
import sys
import traceback
from typing import Any

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from opd_jax import config as configs
from opd_jax import compilations, distributed, host_memory, progress
from opd_jax.pipelines import pick

# What may change when a workdir is resumed; anything else would make it another run. Of these,
# total_steps bends a schedule that runs to zero, and another mesh rounds differently.
RESUMABLE = ("total_steps", "log_every", "writers", "export", "checkpoint", "eval.every", "eval.at",
             "mesh", "data.cache", "verifier.workers", "verifier.allow_unsafe_code",
             "teacher_memory", "endpoint.timeout_s", "endpoint.retries", "endpoint.at_once")

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file in configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything the run leaves behind.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; keys are set as --config.key=value")
  config, workdir = CONFIG.value, WORKDIR.value
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # the libraries' INFO would bury the run's own lines
  # Compiling takes longer than many a tiny run: what was compiled once is kept.
  if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR names another place
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/opd_jax/xla"))
  try:
    configs.validate(config)
    compilations.for_tpus()
    distributed.initialize()
    progress.console.quiet = not distributed.is_first()
    pipeline = pick(config.pipeline)
    distributed.check_alike("config", config.to_json())
    with contextlib.ExitStack() as stack:
      distributed.of_first(lambda: stack.enter_context(locked(workdir)))
      distributed.check_shared(workdir)
      distributed.of_first(lambda: remember(config, workdir))
      pipeline.run(config, workdir)
  except (ValueError, FloatingPointError, OSError) as error:
    logging.debug("where it happened", exc_info=True)
    print(f"{distributed.who()}error: {error}", file=sys.stderr)
    distributed.leave(2)
  except BaseException as error:  # Ctrl-C too: an ordinary exit would wait for the others
    if distributed.count() == 1:
      raise
    traceback.print_exc()
    last = str(error).strip().splitlines() or [repr(error)]
    print(f"{distributed.who()}error: this process cannot go on, and with it all end: {last[0]}\n"
          "If another one was lost, the same command goes on from the last checkpoint.",
          file=sys.stderr)
    distributed.leave(1)


class locked:
  """Holds a workdir for one process; the kernel lets go of it however the process ends."""

  def __init__(self, workdir: str):
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    self._workdir = workdir
    self._file = open(pathlib.Path(workdir) / "lock", "a+")

  def __enter__(self) -> None:
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._file.seek(0)
      raise ValueError(f"{self._workdir} is in use by process {self._file.read().strip()}; wait "
                       "for it, stop it, or choose another --workdir (if that machine is lost, "
                       f"remove {self._workdir}/lock)") from None
    self._file.truncate(0)
    self._file.write(f"{os.getpid()} on {socket.gethostname()}")
    self._file.flush()

  def __exit__(self, *error: Any) -> None:
    self._file.close()


def remember(config: Any, workdir: str) -> None:
  """Writes config.json as run; refuses a workdir that belongs to another config.

  A workdir belongs to a config once a run has left results in it: one that failed at the
  start, over a mistyped path for example, may be tried again with another.

  Raises: ValueError showing each key that differs.
  """
  path = pathlib.Path(workdir) / "config.json"
  now = json.loads(config.to_json())
  if path.is_file() and _has_results(pathlib.Path(workdir)):
    before, after = _flat(json.loads(path.read_text())), _flat(now)
    differ = [key for key in sorted(before.keys() | after.keys())
              if before.get(key) != after.get(key)
              and not any(key == free or key.startswith(free + ".") for free in RESUMABLE)]
    if differ:
      lines = [f"  {key}: {before.get(key, '(none)')} there, {after.get(key, '(none)')} now"
               for key in differ]
      raise ValueError(f"{workdir} belongs to another config:\n" + "\n".join(lines)
                       + "\nChoose another --workdir, or give the same config to resume.")
  aside = path.with_suffix(".tmp")
  aside.write_text(json.dumps(now, indent=2))
  aside.rename(path)


def _has_results(workdir: pathlib.Path) -> bool:
  lines = [path for pattern in ("*", "chains/*", "epochs/*/*")
           for path in workdir.glob(f"{pattern}.jsonl")]
  runs = "checkpoints/[0-9]*", "runs/*/checkpoints/[0-9]*"  # its own, those of a study
  return (any(any(workdir.glob(pattern)) for pattern in runs)
          or any(path.is_file() and path.stat().st_size > 0 for path in lines))


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      out |= _flat(value, f"{path}{key}.")
    else:
      out[path + key] = value
  return out


def parse(argv: list[str], usage: str = "python -m opd_jax.main --config=configs/quickstart.py "
          "--workdir=runs/quickstart") -> list[str]:
  """absl's flag parser, with one line instead of a traceback for what a user can get wrong.

  Args:
    argv: the command line.
    usage: a complete one; its flags have no defaults.
  """
  try:
    rest = flags.FLAGS(argv)
    for name in re.findall(r"--(\w+)=", usage):
      if flags.FLAGS[name].value is None:
        raise ValueError(f"--{name} is missing. Usage: {usage}")
    CONFIG.value.pipeline  # a config file that cannot be read says so at its first use
    return rest
  except (AttributeError, KeyError) as error:
    print(f"error: {_unknown_key(error, argv)}", file=sys.stderr)
  except (flags.Error, ValueError, OSError) as error:
    # A config file that raises arrives with its whole traceback: the last line says what and why.
    last = str(error).strip().splitlines()[-1].strip()
    print(f"error: {last.removeprefix('ValueError: ')}", file=sys.stderr)
  sys.exit(2)


def _unknown_key(error: Exception, argv: list[str]) -> str:
  """The first key on the command line that the config lacks, the nearest, and its section's."""
  flag = flags.FLAGS["config"]
  file = re.search(r" --?config[= ](\S+)", " ".join(argv))
  for name in (arg.partition("=")[0].lstrip("-") for arg in argv if file):
    path, section = "config", flag.parser.parse(file[1])
    for key in name.split(".")[1:] if name.startswith("config.") else ():
      if not isinstance(section, ml_collections.ConfigDict):
        return f"unknown config key {name}: {path} is {section!r}, not a section"
      if key not in section:
        return (f"unknown config key {name}.{configs.nearest(key, section)} "
                f"{path} has: {', '.join(sorted(section))}")
      path, section = f"{path}.{key}", section[key]
  return f"unknown config key {error}"


if __name__ == "__main__":
  host_memory.ensure()
  app.run(main, flags_parser=parse)
