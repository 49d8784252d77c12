"""A stage that is killed goes on where it was, and leaves what it would have left."""

import pathlib

from absl.testing import absltest, parameterized

from opd_jax.pipelines import stages


class Killed(Exception):
  pass


class StagesTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path, "deep", "stage.jsonl")
    self.asked = []

  def make(self, start, stop):
    self.asked.append((start, stop))
    return [{"place": i, "text": "ä\n" * i} for i in range(start, stop)]

  def fill(self, total=10, make=None):
    return stages.rows(self.path, total, 4, make or self.make)

  def test_blocks_are_made_once(self):
    found = self.fill()
    self.assertEqual(self.asked, [(0, 4), (4, 8), (8, 10)])
    self.assertEqual(found, self.make(0, 10))
    self.asked.clear()
    self.assertEqual(self.fill(), found)
    self.assertEqual(stages.read(self.path), found)
    self.assertEmpty(self.asked)

  # After whole lines, in the middle of a line and of a letter, and at the very beginning.
  @parameterized.parameters(0, 1, 30, 31, 32, 33, 100, 101, 210, -1)
  def test_broken_off_anywhere_it_ends_the_same(self, size):
    self.fill()
    whole = self.path.read_bytes()
    self.path.write_bytes(whole[:size])
    self.asked.clear()
    self.fill()
    self.assertEqual(self.path.read_bytes(), whole)
    self.assertEqual(self.asked[-1], (8, 10))
    lines = whole[:size].count(b"\n")
    self.assertEqual(self.asked[0][0], lines // 4 * 4)

  def test_without_a_file_nothing_is_kept(self):
    self.assertEqual(stages.rows(None, 10, 4, self.make), self.make(0, 10))
    self.assertEqual(self.asked[:3], [(0, 4), (4, 8), (8, 10)])
    self.assertFalse(self.path.exists())

  def test_what_was_made_before_a_failure_is_kept(self):
    def broken(start, stop):
      if start == 8:
        raise Killed
      return self.make(start, stop)
    with self.assertRaises(Killed):
      self.fill(make=broken)
    self.assertLen(stages.read(self.path), 8)

  def test_a_file_of_another_config_is_refused(self):
    self.fill()
    with self.assertRaisesRegex(ValueError, "has 10 rows, and this stage only 9"):
      self.fill(total=9)

  def test_all_that_rows_rest_on_is_remembered_and_until_there_are_rows_may_change(self):
    folder = self.path.parent
    stages.begin_with(folder, "weights", lambda: "old")
    for name in ("weights", "rubric"):
      stages.begin_with(folder, name, lambda: "new")
    self.fill()
    for name in ("weights", "rubric"):
      stages.begin_with(folder, name, lambda: "new")
      with self.assertRaisesRegex(ValueError, f"the {name} changed since the rows"):
        stages.begin_with(folder, name, lambda: "other")

  def test_what_is_not_json_is_named(self):
    self.fill()
    self.path.write_text('{"place": 0}\n{"place" 1}\n')
    with self.assertRaisesRegex(ValueError, "stage.jsonl, line 2: not JSON"):
      self.fill()


if __name__ == "__main__":
  absltest.main()
