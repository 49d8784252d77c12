"""One step of TRL's DistillationTrainer on given tokens, for train.py; peers.start runs it.

Reverse KL over the whole vocabulary (beta=1), the default. `trainer.train()` cannot be given
responses: `_prepare_inputs` generates them. Here it returns the batch as it is, and a turn is what
`train` does with that: the trainer's own `training_step` (teacher, student, loss, backward), then
clipping and its own AdamW. Gradient checkpointing, which saves memory, is off; parameters are in
the dtype, without autocast.

The load: model (the content of a config.json), dtype, tokens [B, T], prompt (how many of them come
before the response), seed.
"""

import talk  # first, see there

from collections.abc import Callable
import os
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import tokenizers
import torch
import transformers
import trl


WARM_UP = 5  # turns: one of the first few took several times as long as the others


class GivenTokens(trl.DistillationTrainer):
  """The trainer, without generation."""

  def _prepare_inputs(self, batch):
    return batch


def empty_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """The trainer wants one; with given tokens nothing is put into words."""
  words = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="<eos>",
      padding_side="left")


def build(load: dict[str, Any]) -> Callable[[], int]:
  torch.manual_seed(load["seed"])
  config = transformers.AutoConfig.for_model(**load["model"])
  student, teacher = (transformers.AutoModelForCausalLM.from_config(
      config, dtype=getattr(torch, load["dtype"])) for _ in range(2))
  ids, prompt = torch.tensor(load["tokens"]), load["prompt"]
  real = torch.ones_like(ids)
  batch = dict(prompt_ids=ids[:, :prompt], prompt_mask=real[:, :prompt],
               completion_ids=ids[:, prompt:], completion_mask=real[:, prompt:],
               num_items_in_batch=real[:, prompt:].sum())
  folder = tempfile.TemporaryDirectory()
  trainer = GivenTokens(student, teacher, trl.DistillationConfig(
      output_dir=folder.name, per_device_train_batch_size=len(ids), beta=1.0, learning_rate=1e-4,
      bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
      seed=load["seed"]), processing_class=empty_tokenizer())
  trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
  model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())

  def turn() -> int:
    trainer.training_step(model, batch, None)
    trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return ids.numel()
  for _ in range(WARM_UP):
    turn()
  return turn


if __name__ == "__main__":
  talk.take_turns(build)
