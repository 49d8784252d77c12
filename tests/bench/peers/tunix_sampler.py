"""Tunix's own ("vanilla") sampler on a random Llama, for decode.py; peers.start runs it.

The sampler of `VanillaRollout`, called as that calls it, with `top_p=1` and no `top_k`, for which
it skips the sort. It decodes a batch until the given number of steps, so a batch of mixed lengths
runs until its longest ends, and compiles anew for each length, in the first turn. It has no way to
read a group's prompt once: its trainers repeat the prompt, and so does this. Weights are cast to
the dtype, and the cache follows them.

The load: model (the content of a config.json), dtype, prompts [R, S] and limits [R] of ids and
lengths, batch (rows at once), seed.
"""

import talk  # first, see there

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from tunix.generate import sampler
from tunix.models.llama3 import model as llama


class Ids:
  """A tokenizer whose text is the ids themselves: the sampler takes strings."""

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int]) -> str:
    return ""

  def pad_id(self) -> int:
    return 0

  bos_id = eos_id = pad_id  # 0: no BOS is put before a prompt


def random_llama(shape: dict[str, Any], dtype: str, seed: int) -> llama.Llama3:
  """Of Tunix's own model class, which makes float32, and zeros for MLPs; these are normal."""
  config = llama.ModelConfig(
      num_layers=shape["num_hidden_layers"], vocab_size=shape["vocab_size"],
      embed_dim=shape["hidden_size"], hidden_dim=shape["intermediate_size"],
      num_heads=shape["num_attention_heads"], head_dim=shape["head_dim"],
      num_kv_heads=shape["num_key_value_heads"], rope_theta=int(shape["rope_theta"]),
      norm_eps=shape["rms_norm_eps"], weight_tying=shape["tie_word_embeddings"])
  graph, weights = nnx.split(llama.Llama3(config, rngs=nnx.Rngs(seed)))
  draw = np.random.default_rng(seed).standard_normal
  return nnx.merge(graph, jax.tree.map(
      lambda x: jnp.asarray(0.02 * draw(x.shape, np.float32), jnp.dtype(dtype)), weights))


def build(load: dict[str, Any]) -> Callable[[], int]:
  shape, limits, batch = load["model"], load["limits"], load["batch"]
  prompts, length = [" ".join(map(str, ids)) for ids in load["prompts"]], len(load["prompts"][0])
  sample = sampler.Sampler(
      random_llama(shape, load["dtype"], load["seed"]), Ids(),
      sampler.CacheConfig(cache_size=length + max(limits), num_layers=shape["num_hidden_layers"],
                          num_kv_heads=shape["num_key_value_heads"], head_dim=shape["head_dim"]))

  def turn() -> int:
    for at in range(0, len(prompts), batch):
      longest = max(limits[at:at + batch])
      made = sample(prompts[at:at + batch], max_generation_steps=longest, max_prompt_length=length,
                    eos_tokens=[shape["vocab_size"]], temperature=1.0, top_p=1.0, top_k=None,
                    seed=load["seed"])
      assert all(len(row) == longest for row in made.tokens)
    return sum(limits)
  return turn


if __name__ == "__main__":
  talk.take_turns(build)
