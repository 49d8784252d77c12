"""Launchers are sound shell, print every command in a dry run, and go on after a preemption."""

import os
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

# Stands for gcloud: notes its calls, and says how the slice is, one word a look: of the request, or
# of its machines once there are any. ERROR: it gives no answer.
GCLOUD = """#!/bin/bash
echo "$*" >> calls
case "$*" in
  *"queued-resources list"*)
    word=$(head -n 1 states)
    case "$word" in
      READY | PREEMPTED | REPAIRING) echo ACTIVE ;;
      *) sed -i 1d states; [ "$word" != ERROR ] || exit 1; echo "$word" ;;
    esac ;;
  *"tpu-vm list"*) head -n 1 states; sed -i 1d states ;;
  *detached.sh*) read -r code < codes; sed -i 1d codes; exit "$code" ;;
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
    verbs = ("queued-resources list", "queued-resources list", "create", "queued-resources list",
             "tpu-vm list", "git archive", "scp", "apt-get", "mkdir", "mount", "chmod", "tar",
             "EXTRAS=tpu", "detached.sh", "delete")
    self.assertLen(lines, len(verbs))
    for line, verb in zip(lines, verbs):
      self.assertIn(verb, line)
    self.assertIn("/t$", lines[0])
    self.assertEqual(lines[2], (
        "gcloud compute tpus queued-resources create t --node-id=t --project=p --zone=z "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"))
    self.assertIn("--worker=all", lines[13])
    self.assertIn("a b", lines[13])
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
      self.assertIn("--max-restarts=50 --restart-on-exit-codes=1,75", lines[0])
      self.assertIn("exec bash launch/worker.sh", lines[0])

  def test_slurm(self):
    lines = self.dry_run("launch/slurm_gpu.sbatch", "--config=c.py", "--workdir=runs/a")
    self.assertEqual(lines, [
        "env EXTRAS=gpu bash launch/env.sh",
        "srun --kill-on-bad-exit=1 --cpus-per-task=8 env OPD_JAX_DISTRIBUTED=auto "
        ".venv/bin/python -u -m "
        "opd_jax.main --config=c.py --workdir=runs/a",
        "scancel --signal=TERM JOB", "scontrol requeue JOB"])

  def test_what_is_missing_is_named(self):
    for name, script in (("TPU", "tpu_pod"), ("IMAGE", "gke_xpk")):
      lines = self.dry_run(f"launch/{script}.sh", code=2, **SETTINGS | {name: ""})
      self.assertEqual(lines, [f"error: the variable {name} is not set; launch/README.md says "
                               "what it is"])
    self.assertIn("must be cluster, image or run", self.dry_run(
        "launch/gke_xpk.sh", "start", code=2, **SETTINGS)[0])
    self.assertIn("--workdir=/mnt/share/... is missing", self.dry_run(
        "launch/gke_xpk.sh", "run", "first", "--config=c.py", code=1, **SETTINGS)[0])


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
             for verb in ("create", "delete", "detached.sh") if f" {verb} " in line or
             verb == "detached.sh" and verb in line]
    return done.returncode, verbs, done.stderr

  def test_a_preempted_slice_is_asked_for_again_and_the_run_goes_on(self):
    code, verbs, said = self.tpu_pod(
        # The first look. None; waiting; there; gone as the run broke off; being given back; none.
        ["", "", "WAITING_FOR_RESOURCES", "READY", "SUSPENDED", "SUSPENDED", "", "READY"], [255, 0])
    self.assertEqual(code, 0, said)
    self.assertEqual(verbs, ["create", "detached.sh", "delete", "create", "detached.sh", "delete"])
    self.assertIn("taken away", said)

  def test_machines_may_be_gone_before_the_request_says_so(self):
    code, verbs, said = self.tpu_pod(
        ["REPAIRING", "READY", "READY", "READY", "PREEMPTED", "PREEMPTED", "", "READY"],
        [75, 0])
    self.assertEqual(code, 0, said)
    self.assertEqual(verbs, ["detached.sh", "delete", "create", "detached.sh", "delete"])

  def test_no_answer_is_no_slice_that_is_gone(self):
    code, verbs, said = self.tpu_pod(["READY", "READY", "ERROR", "ERROR", *["READY"] * 5], [1])
    self.assertEqual((code, verbs), (1, ["detached.sh"]))
    self.assertIn("gave no answer", said)
    code, verbs, _ = self.tpu_pod(["ERROR"], [0])  # at the start: PROJECT or ZONE is wrong
    self.assertEqual((code, verbs), (1, []))

  def test_a_lost_connection_is_taken_up_again(self):
    code, verbs, said = self.tpu_pod(["READY"] * 8, [255, 0])
    self.assertEqual(code, 0, said)
    self.assertEqual(verbs, ["detached.sh", "detached.sh", "delete"])
    self.assertIn("connection was lost", said)

  def test_a_run_that_fails_on_a_sound_slice_is_not_repeated(self):
    for failed in (1, 2):
      code, verbs, said = self.tpu_pod(["READY"] * 7, [failed])
      self.assertEqual((code, verbs), (failed, ["detached.sh"]))
      self.assertIn("The slice t still runs, and costs", said)

  def test_a_request_that_failed_is_not_repeated(self):
    code, verbs, said = self.tpu_pod(["", "FAILED"], [])
    self.assertEqual((code, verbs), (1, []))
    self.assertIn("delete it before asking again", said)

  def worker(self, python, script="worker.sh", arguments=ARGUMENTS):
    folder_with(self.room / ".venv/bin", python=python)
    return subprocess.Popen(["/bin/bash", f"launch/{script}", *arguments], cwd=self.room,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={"PATH": "/usr/bin:/bin"})

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

  def test_a_run_does_not_end_with_who_follows_it(self):
    python = ("#!/bin/bash\ntrap 'echo saved; exit 0' TERM\necho started\n"
              "until [ -e end ]; do sleep 0.05; done\nexit 3\n")
    first = self.worker(python, "detached.sh")
    self.assertEqual(first.stdout.readline(), "started\n")
    first.kill()
    again = self.worker(python, "detached.sh")
    self.assertEqual(again.stdout.readline(), "started\n")  # from its beginning
    other = self.worker(python, "detached.sh", ("--config=other.py",))
    self.assertIn("another run is under way here: '--config=configs/opd.py", other.communicate()[0])
    self.assertEqual(other.returncode, 2)
    (self.room / "end").touch()
    self.assertEqual(again.communicate()[0], "")
    self.assertEqual(again.returncode, 3)
    # It has ended: the next one is another run. SIGTERM by its number stops it.
    (self.room / "end").unlink()
    last = self.worker(python, "detached.sh")
    self.assertEqual(last.stdout.readline(), "started\n")
    os.kill(int((self.room / "worker.pid").read_text()), signal.SIGTERM)
    self.assertEqual(last.communicate()[0], "saved\n")
    self.assertEqual(last.returncode, 75)


if __name__ == "__main__":
  absltest.main()
