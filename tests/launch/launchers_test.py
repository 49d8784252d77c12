"""Launchers are sound shell, print every command in a dry run, and go on after a preemption."""

import pathlib
import shutil
import signal
import subprocess
import sys
import time

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for pattern in ("*.sh", "*.sbatch")
                 for path in ROOT.glob(f"launch/{pattern}"))
ARGUMENTS = ("--config=configs/opd.py:paper", "--workdir=/mnt/share/runs/a b")
SETTINGS = dict(PROJECT="p", ZONE="z", TPU="t", TYPE="v5litepod-16", SHARE="10.0.0.2:/opd",
                CLUSTER="c", IMAGE="registry/opd_jax")
# Whatever is called in a dry run is no command of these: it fails the test.
FORBIDDEN = ("gcloud", "xpk", "docker", "srun", "scancel", "scontrol", "git", "sleep", "env")

# Stands for gcloud: notes its calls, and says what the slice's state is, one word a question.
GCLOUD = """#!/bin/bash
echo "$*" >> calls
case "$*" in
  *describe*) head -n 1 states; sed -i 1d states ;;
  *worker.sh*) read -r code < codes; sed -i 1d codes; exit "$code" ;;
esac
"""


def folder_with(where, **scripts):
  """A folder of executable scripts by name."""
  where.mkdir(parents=True, exist_ok=True)
  for name, text in scripts.items():
    (where / name).write_text(text)
    (where / name).chmod(0o755)
  return str(where)


class LintTest(parameterized.TestCase):

  @parameterized.parameters(*SCRIPTS, ".ci/run")
  def test_shellcheck_finds_nothing(self, script):
    program = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, "-x", "-P", "SCRIPTDIR", script], cwd=ROOT,
                          capture_output=True, text=True)
    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


class DryRunTest(parameterized.TestCase):

  def dry_run(self, *command, code=0, **settings):
    """Runs a launcher with DRY_RUN=1; the commands that it printed."""
    room = pathlib.Path(self.create_tempdir().full_path)
    path = folder_with(room / "bin", **{
        name: f"#!/bin/sh\ntouch {room}/called\n" for name in FORBIDDEN})
    env = {"PATH": f"{path}:/usr/bin:/bin", "DRY_RUN": "1", **settings}
    done = subprocess.run(["/bin/bash", *command], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    self.assertEqual(done.returncode, code, done.stderr)
    self.assertFalse((room / "called").exists())
    return [line.removeprefix("+ ") for line in done.stderr.splitlines()]

  def test_tpu_pod(self):
    lines = self.dry_run("launch/tpu_pod.sh", *ARGUMENTS, **SETTINGS)
    verbs = ("describe", "create", "describe", "git archive", "scp", "apt-get", "mkdir", "mount",
             "chmod", "tar", "EXTRAS=tpu", "worker.sh", "delete")
    self.assertLen(lines, len(verbs))
    for line, verb in zip(lines, verbs):
      self.assertIn(verb, line)
    self.assertEqual(lines[1], (
        "gcloud compute tpus queued-resources create t --node-id=t --project=p --zone=z "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"))
    self.assertIn("--worker=all", lines[11])
    self.assertIn("a b", lines[11])
    self.assertNotIn("--spot", "".join(self.dry_run(
        "launch/tpu_pod.sh", *ARGUMENTS, **SETTINGS, SPOT="0")))
    kept = self.dry_run("launch/tpu_pod.sh", *ARGUMENTS, **SETTINGS, KEEP="1")
    self.assertNotIn("delete", "".join(kept))

  @parameterized.parameters(
      (("cluster",), ("xpk cluster create", "xpk storage create opd-share")),
      (("image",), ("docker build --file=launch/docker/Dockerfile", "docker push registry")),
      (("run", "first", *ARGUMENTS), ("xpk workload create",)))
  def test_gke(self, arguments, commands):
    lines = self.dry_run("launch/gke_xpk.sh", *arguments, **SETTINGS)
    self.assertLen(lines, len(commands))
    for line, command in zip(lines, commands):
      self.assertStartsWith(line, command)
    if arguments[0] == "run":
      self.assertIn("--max-restarts=50", lines[0])
      self.assertIn("bash launch/worker.sh", lines[0])

  def test_slurm(self):
    lines = self.dry_run("launch/slurm_gpu.sbatch", "--config=c.py", "--workdir=runs/a")
    self.assertEqual(lines, [
        "env EXTRAS=gpu bash launch/env.sh",
        "srun --kill-on-bad-exit=1 env OPD_JAX_DISTRIBUTED=auto .venv/bin/python -u -m "
        "opd_jax.main --config=c.py --workdir=runs/a",
        "scancel --signal=TERM JOB", "scontrol requeue JOB"])

  def test_what_is_missing_is_named(self):
    for name, script in (("TPU", "tpu_pod"), ("IMAGE", "gke_xpk")):
      lines = self.dry_run(f"launch/{script}.sh", code=2, **SETTINGS | {name: ""})
      self.assertEqual(lines, [f"error: the variable {name} is not set; launch/README.md says "
                               "what it is"])
    self.assertIn("must be cluster, image or run", self.dry_run(
        "launch/gke_xpk.sh", "start", code=2, **SETTINGS)[0])


class PreemptionTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.room = pathlib.Path(self.create_tempdir().full_path)
    shutil.copytree(ROOT / "launch", self.room / "launch")

  def tpu_pod(self, states, codes):
    """Runs tpu_pod.sh with a gcloud that answers so; its exit status and what it called."""
    path = folder_with(self.room / "bin", gcloud=GCLOUD, git="#!/bin/sh\n")
    (self.room / "states").write_text("\n".join(states) + "\n")
    (self.room / "codes").write_text("\n".join(map(str, codes)) + "\n")
    done = subprocess.run(
        ["/bin/bash", "launch/tpu_pod.sh", *ARGUMENTS], cwd=self.room, capture_output=True,
        env={"PATH": f"{path}:/usr/bin:/bin", "POLL_S": "0", **SETTINGS}, text=True)
    calls = (self.room / "calls").read_text()
    (self.room / "calls").unlink()
    verbs = [verb for line in calls.splitlines()
             for verb in ("create", "delete", "worker.sh") if f" {verb} " in line or
             verb == "worker.sh" and verb in line]
    return done.returncode, verbs, done.stderr

  def test_a_preempted_slice_is_asked_for_again_and_the_run_goes_on(self):
    code, verbs, said = self.tpu_pod(
        # None; waiting; there; gone after the run broke off; being given back; none; there; there.
        ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE", "ACTIVE"],
        [255, 0])
    self.assertEqual(code, 0, said)
    self.assertEqual(verbs, ["create", "worker.sh", "delete", "create", "worker.sh", "delete"])

  def test_a_run_that_was_stopped_in_order_by_the_preemption_goes_on_too(self):
    code, verbs, said = self.tpu_pod(
        ["ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE", "ACTIVE"], [75, 0])
    self.assertEqual(code, 0, said)
    self.assertEqual(verbs, ["worker.sh", "delete", "create", "worker.sh", "delete"])

  def test_a_run_that_fails_on_a_sound_slice_is_not_repeated(self):
    code, verbs, said = self.tpu_pod(["ACTIVE", "ACTIVE"], [2])
    self.assertEqual(code, 2)
    self.assertEqual(verbs, ["worker.sh"])
    self.assertIn("the slice t still runs, and costs", said)

  def worker(self, python):
    folder_with(self.room / ".venv/bin", python=python)
    return subprocess.Popen(["/bin/bash", "launch/worker.sh", *ARGUMENTS], cwd=self.room,
                            stdout=subprocess.PIPE, text=True, env={"PATH": "/usr/bin:/bin"})

  def test_a_worker_hands_over_arguments_and_exit_status(self):
    for code in (0, 2):
      worker = self.worker(f'#!/bin/sh\nprintf "%s\\n" "$OPD_JAX_DISTRIBUTED" "$@"\nexit {code}\n')
      said = worker.communicate()[0].splitlines()
      self.assertEqual(worker.returncode, code)
      self.assertEqual(said, ["auto", "-u", "-m", "opd_jax.main", *ARGUMENTS])

  def test_a_worker_that_was_stopped_has_not_finished(self):
    worker = self.worker("#!/bin/bash\ntrap 'echo saved; exit 0' TERM\necho started\n"
                         "while :; do sleep 0.05; done\n")
    self.assertEqual(worker.stdout.readline(), "started\n")
    time.sleep(0.1)
    worker.send_signal(signal.SIGTERM)
    self.assertEqual(worker.communicate()[0], "saved\n")
    self.assertEqual(worker.returncode, 75)


if __name__ == "__main__":
  absltest.main()
