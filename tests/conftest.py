"""Under OPD_JAX_STRICT_SKIPS=1 (.ci/run) a skipped test fails the run, unless it had to be."""

import atexit
import gc
import os
import shutil
import subprocess
import tempfile

# Nearly all of the tests' time is XLA's: it is asked for code quickly, here and in child processes,
# not for quick code; and what one test has compiled no other compiles, of whatever process. Before
# JAX is imported, and by the first of pytest-xdist's processes, for all.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 "
                      "--xla_llvm_disable_expensive_passes=true")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="opd_jax_compiled_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# pylint: disable=wrong-import-position
from absl import flags
import jax
import pytest

flags.FLAGS.mark_as_parsed()  # pytest owns the command line; absltest's folders need its flags


@pytest.fixture(autouse=True, scope="module")
def forget():
  """Lets go of what a file compiled: all files' programs together need more mappings than Linux
  allows a process (vm.max_map_count, 65,530), and XLA aborts when there are no more."""
  yield
  jax.clear_caches()
  gc.collect()


def _expected(reason: str) -> bool:
  # Where there are no data sets, .ci/run leaves the variable unset; a kernel may refuse namespaces;
  # libtpu's wheel may not be to be had.
  return ("OPD_JAX_DATA is not set" in reason and "OPD_JAX_DATA" not in os.environ
          or "no isolation here: " in reason and not _isolates() or "no libtpu here: " in reason)


def _isolates() -> bool:
  """Whether the kernel gives namespaces, by another program: a jail that is broken is no reason."""
  asked = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount", "--net", "true"]
  return shutil.which("unshare") is not None and not subprocess.run(
      asked, check=False, capture_output=True).returncode


def pytest_sessionfinish(session, exitstatus):
  if hasattr(session.config, "workerinput"):
    return  # one of pytest-xdist's processes: the one that collects all reports looks at them
  if os.environ.get("OPD_JAX_STRICT_SKIPS") != "1" or exitstatus != 0:
    return
  reporter = session.config.pluginmanager.get_plugin("terminalreporter")
  for report in reporter.stats.get("skipped", []):
    reason = str(report.longrepr[-1])
    if _expected(reason):
      reporter.write_line(f"notice: not tested: {report.nodeid}: {reason}", yellow=True)
    else:
      reporter.write_line(f"\nunexpected skip: {report.nodeid}: {reason}", red=True)
      session.exitstatus = 1
