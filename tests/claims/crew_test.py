"""A run that was killed is gone on with, and nothing else that lies in its place."""

from unittest import mock

from absl.testing import absltest

from opd_jax import checkpoint
from opd_jax import config as configs
from opd_jax import progress
from opd_jax.claims import crew


def learning():
  return configs.offline(
      total_steps=4, log_every=1, student=dict(source="tiny:weak"), writers=("jsonl",),
      data=dict(builder="notes", builder_kw=dict(kind="sft", train=64, test=8)),
      rollout=dict(max_prompt=20, max_response=14), verifier=dict(name="notes"),
      batch=dict(tokens=136, buckets=(34,), chunk=8),
      eval=dict(prompts=2, samples=1, ks=(1,), batch=2, every=2), checkpoint=dict(every=2))


class Killed(BaseException):
  """Unlike an Exception nobody catches it, as nobody does SIGKILL."""


def run(workdir, rests_on):
  """What a run has measured, and what it said of where it begins."""
  notes = []
  with mock.patch.object(progress, "note", notes.append):
    found = crew.run(learning(), workdir, rests_on)
  del found["wall_s"]
  return found, [note for note in notes if note.startswith("resuming")]


class RunTest(absltest.TestCase):

  def killed(self, workdir):
    """A run that dies once its first checkpoint is there."""
    save = checkpoint.Checkpoints.save

    def deadly(*arguments):
      save(*arguments)
      raise Killed

    with self.assertRaises(Killed), mock.patch.object(checkpoint.Checkpoints, "save", deadly):
      crew.run(learning(), workdir, "x")

  def test_a_killed_run_goes_on_and_another_begins_anew(self):
    whole, notes = run(self.create_tempdir().full_path, "x")
    self.assertEqual(notes, [])
    workdir = self.create_tempdir().full_path
    self.killed(workdir)
    self.assertEqual(run(workdir, "x"), (whole, ["resuming after 2 updates"]))
    self.killed(workdir)  # what had come to its end was no beginning: this one made 2 updates
    self.assertEqual(run(workdir, "y"), (whole, []))

  def test_a_run_that_failed_begins_anew(self):
    workdir = self.create_tempdir().full_path
    with mock.patch.object(crew.measured, "of", side_effect=OSError("disk")):
      with self.assertRaises(OSError):
        crew.run(learning(), workdir, "x")
    self.assertEqual(run(workdir, "x")[1], [])


if __name__ == "__main__":
  absltest.main()
