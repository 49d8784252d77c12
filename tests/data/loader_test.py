"""Rows come in an order that depends on the seed alone and can be resumed exactly."""

import json

from absl.testing import absltest, parameterized

from opd_jax.data import chat, loader
from opd_jax.data import tokenizer as tokenizers

ROWS = 23


def batches(size=4, rows=ROWS, fits=lambda row: True, seed=3, **kwargs):
  source = [dict(id=str(i), n=i) for i in range(rows)]
  return loader.Batches(source, size, transform=lambda row: row, fits=fits, seed=seed, **kwargs)


def buckets(tokens=32, sizes=(8, 16, 32), seed=0):
  return loader.BucketedBatches(batches(size=10), lambda row: row["n"], sizes, tokens, seed)


def ids(data, count):
  return [row["id"] for _ in range(count) for row in next(data)]


def through_json(state):
  return json.loads(json.dumps(state))


class BatchesTest(parameterized.TestCase):

  def test_an_epoch_is_every_row_once_in_a_new_order_each_time(self):
    data = batches(size=ROWS)
    first, second = ids(data, 1), ids(data, 1)
    self.assertCountEqual(first, map(str, range(ROWS)))
    self.assertCountEqual(second, first)
    self.assertNotEqual(first, second)

  def test_the_order_is_the_seeds(self):
    self.assertEqual(ids(batches(), 12), ids(batches(), 12))
    self.assertNotEqual(ids(batches(), 12), ids(batches(seed=4), 12))

  def test_without_shuffling_rows_come_as_they_are(self):
    self.assertEqual(ids(batches(size=ROWS, shuffle=False), 2), [*map(str, range(ROWS))] * 2)

  @parameterized.parameters(0, 1, 5, 6, 17)
  def test_resuming_is_exact_across_epochs(self, done):
    data, again = batches(), batches()
    ids(data, done)
    state = through_json(data.state())
    want = ids(data, 20)
    again.restore(state)
    self.assertEqual(ids(again, 20), want)

  def test_a_state_does_not_move_with_its_iterator(self):
    data = batches()
    state = data.state()
    before = through_json(state)
    ids(data, 9)
    self.assertEqual(state, before)

  def test_rows_that_do_not_fit_are_dropped_whole_and_counted(self):
    data = batches(size=1, fits=lambda row: row["n"] >= 5, shuffle=False)
    self.assertEqual(ids(data, ROWS - 5), [*map(str, range(5, ROWS))])
    self.assertEqual(data.dropped, 5)
    ids(data, 1)
    self.assertEqual(data.dropped, 10)
    again = batches(size=1, fits=lambda row: row["n"] >= 5, shuffle=False)
    again.restore(through_json(data.state()))
    self.assertEqual(again.dropped, 10)
    self.assertEqual(ids(again, 3), ids(data, 3))

  def test_data_without_a_row_that_fits_is_an_error(self):
    with self.assertRaisesRegex(ValueError, f"^{2 * ROWS} rows in a row were dropped as too long"):
      next(batches(fits=lambda row: False))

  def test_data_without_rows_are_an_error(self):
    with self.assertRaisesRegex(ValueError, "the data has no rows"):
      batches(rows=0)

  def test_a_single_row_that_fits_is_found_however_it_is_shuffled(self):
    for seed in range(20):
      self.assertEqual(ids(batches(size=1, rows=9, fits=lambda row: row["n"] == 4, seed=seed), 3),
                       ["4"] * 3)


class BucketedBatchesTest(parameterized.TestCase):

  def test_each_row_is_in_its_smallest_bucket_and_shapes_are_few(self):
    data = buckets()
    for _ in range(30):
      size, rows = next(data)
      self.assertLen(rows, 32 // size)
      self.assertNotEmpty([row for row in rows if row])
      for row in rows:
        if row is not None:
          self.assertEqual(size, next(s for s in (8, 16, 32) if row["n"] <= s))

  def test_no_row_is_lost_or_doubled(self):
    data, seen = buckets(), []
    while len(seen) < 3 * ROWS:
      seen += [row["id"] for row in next(data)[1] if row]
    chunks = (len(seen) + 9) // 10  # a chunk of ten may be partly out
    while len(seen) < 10 * chunks:
      seen += [row["id"] for row in next(data)[1] if row]
    self.assertCountEqual(seen, ids(batches(size=10), chunks))

  @parameterized.parameters(*range(14))
  def test_resuming_is_exact_at_every_batch_across_epochs(self, done):
    data, again = buckets(), buckets()
    for _ in range(done):
      next(data)
    state = through_json(data.state())
    want = [next(data) for _ in range(20)]
    again.restore(state)
    self.assertEqual([next(again) for _ in range(20)], want)

  def test_a_resumed_state_is_the_unbroken_ones(self):
    data, again = buckets(), buckets()
    for _ in range(7):
      next(data)
    again.restore(through_json(data.state()))
    for _ in range(5):
      next(data)
      next(again)
    self.assertEqual(again.state(), data.state())

  def test_dropped_rows_are_the_chunks(self):
    chunks = batches(size=10, fits=lambda row: row["n"] <= 16, shuffle=False)
    data = loader.BucketedBatches(chunks, lambda row: row["n"], (8, 16), 32, 0)
    for _ in range(20):
      next(data)
    self.assertEqual(data.dropped, chunks.dropped)
    self.assertGreater(data.dropped, 0)
    again = loader.BucketedBatches(
        batches(size=10, fits=lambda row: row["n"] <= 16, shuffle=False), lambda row: row["n"],
        (8, 16), 32, 0)
    again.restore(through_json(data.state()))
    self.assertEqual(again.dropped, data.dropped)


class EncodeTest(absltest.TestCase):

  def test_responses_end_as_the_template_ends_turns_and_not_with_the_smallest_id(self):
    several = tokenizers.Tokenizer(tokenizers.byte_tokenizer().hf, [0, 2], "several")
    row = dict(id="a", messages=json.dumps(chat.question("2+2?")), response="4")
    got = loader.encode_answered(several)(row)["response_ids"]
    self.assertEqual(got, [*several.encode("4"), 2])

  def test_prompts_are_chats_and_responses_end(self):
    tokenizer = tokenizers.byte_tokenizer()
    row = dict(id="a", messages=json.dumps(chat.question("2+2?")), response="4 <|im_end|>")
    got = loader.encode_answered(tokenizer)(row)
    self.assertEqual(got["prompt_ids"], tokenizer.encode_chat(chat.question("2+2?")))
    self.assertEqual(got["response_ids"][-1], tokenizer.end_id)
    self.assertEqual(got["response_ids"].count(tokenizer.end_id), 1)
    self.assertEqual(tokenizer.decode(got["response_ids"]), "4 <|im_end|>")
    prompt_alone = loader.encode(tokenizer)(row)
    self.assertEqual(prompt_alone, {**row, "prompt_ids": got["prompt_ids"], "teacher_id": 0})
    self.assertNotIn("prompt_ids", row)  # the given row is left as it was

  def test_a_row_without_a_response_to_learn_is_named(self):
    row = dict(id="gsm-17", messages=json.dumps(chat.question("2+2?")), response="")
    with self.assertRaisesRegex(ValueError, "row 'gsm-17' has an empty `response`.*builder_kw"):
      loader.encode_answered(tokenizers.byte_tokenizer())(row)


if __name__ == "__main__":
  absltest.main()
