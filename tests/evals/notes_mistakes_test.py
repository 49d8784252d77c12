"""What is wrong with notes, on hand-made ones."""

from absl.testing import absltest
import numpy as np

from opd_jax.evals import notes_mistakes
from opd_jax.evals.saved import Group


def group(record, *responses):
  return Group("id", [], record, list(responses), [0.0] * len(responses), [True] * len(responses))


class NotesMistakesTest(absltest.TestCase):

  def test_means_over_the_responses_of_a_prompt(self):
    found = notes_mistakes.measures([
        group("1,9,2,8,3,7", "9,8,7:2", "9,8,1:0", "9,8,1:0", "9 8 7"),
        group("9,8,7,1,2,3", "9,8,7:2", "9,8,7:2", "4,5,6:2", "nothing")])
    # 5 nats are 1, -3 are 0: "9,8,1:0" has 2 - 0.5 + 1 - 0.5 = 2 nats.
    np.testing.assert_allclose(found["reward"], [(1 + 2 * 5 / 8) / 4, (2 + 0 + 0) / 4])
    np.testing.assert_allclose(found["of the most frequent"], [5 / 8, 1])
    np.testing.assert_allclose(found["no note"], [1 / 4, 1 / 4])
    np.testing.assert_allclose(found["coverage, nats"], [7 / 3, 2])
    np.testing.assert_allclose(found["truth, nats"], [0, -1.5])
    np.testing.assert_allclose(found["brevity, nats"], [-1 / 3, 0])
    np.testing.assert_allclose(found["arithmetic, nats"], [0, 1])
    # Of the first three facts 1 and 2 are not the greatest: a third of "9,8,1:0", twice of three.
    np.testing.assert_allclose(found["of the head"], [2 / 9, 0])

  def test_without_a_note_there_is_nothing_to_say_of_notes(self):
    found = notes_mistakes.measures([group("1,9,2,8,3,7", "?", "?")])
    self.assertEqual((found["reward"][0], found["no note"][0]), (0.0, 1.0))
    self.assertTrue(np.isnan(found["coverage, nats"][0]))
    self.assertTrue(np.isnan(found["of the head"][0]))


if __name__ == "__main__":
  absltest.main()
