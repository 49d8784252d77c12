"""Under OPD_JAX_NO_SKIPS=1 (CI) a skipped test is a failed run."""

import os

from absl import flags

flags.FLAGS.mark_as_parsed()  # pytest owns the command line; absltest's folders need its flags


def pytest_sessionfinish(session, exitstatus):
  reporter = session.config.pluginmanager.get_plugin("terminalreporter")
  skipped = reporter.stats.get("skipped", [])
  if os.environ.get("OPD_JAX_NO_SKIPS") == "1" and skipped and exitstatus == 0:
    for report in skipped:
      reporter.write_line(f"unexpected skip: {report.nodeid}: {report.longrepr[-1]}")
    session.exitstatus = 1
