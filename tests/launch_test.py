"""launch/env.sh installs when what is asked for is not what is there, and only then."""

import pathlib
import shutil
import subprocess

from absl.testing import absltest

ENV = pathlib.Path(__file__).parents[1] / "launch/env.sh"
# Stands for the Python of .venv: notes what pip is told to install, and can refuse.
PYTHON = '''#!/bin/sh
case "$*" in
  *"pip install"*) echo "$*" >> pip.log; test ! -e offline ;;
esac
'''


class EnvTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    for folder in ("launch", ".venv/bin"):
      (self.root / folder).mkdir(parents=True)
    shutil.copy(ENV, self.root / "launch")
    (self.root / "setup.py").touch()
    python = self.root / ".venv/bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)

  def installs(self, constraints, extras=""):
    """Sources env.sh as the other scripts do; how often pip was asked to install."""
    (self.root / "constraints.txt").write_text(constraints)
    log = self.root / "pip.log"
    log.unlink(missing_ok=True)
    env = {"PATH": "/usr/bin:/bin"} | ({"EXTRAS": extras} if extras else {})  # unset for most users
    done = subprocess.run(["bash", "-c", "set -euo pipefail; source launch/env.sh"], cwd=self.root,
                          env=env, capture_output=True, text=True)
    self.assertEqual(done.returncode, int((self.root / "offline").exists()), done.stderr)
    return len(log.read_text().splitlines()) if log.is_file() else 0

  def test_what_is_there_is_not_installed_again(self):
    self.assertEqual([self.installs("a==1") for _ in range(3)], [1, 0, 0])

  def test_going_back_to_earlier_constraints_installs_them_again(self):
    self.assertEqual([self.installs(c) for c in ("a==1", "a==2", "a==1", "a==1")], [1, 1, 1, 0])

  def test_an_install_that_failed_midway_leaves_nothing_to_rely_on(self):
    self.installs("a==1")
    (self.root / "offline").touch()
    self.installs("a==2")
    (self.root / "offline").unlink()
    self.assertEqual(self.installs("a==1"), 1)

  def test_extras_add_up_under_the_same_constraints(self):
    self.assertEqual([self.installs("a==1", extras) for extras in ("", "test", "", "test")],
                     [1, 1, 0, 0])
    self.assertEqual(self.installs("a==1", "tes"), 1)  # not a part of another name
    self.assertEqual([self.installs("a==2", extras) for extras in ("gpu,test", "test", "gpu")],
                     [1, 0, 0])


if __name__ == "__main__":
  absltest.main()
