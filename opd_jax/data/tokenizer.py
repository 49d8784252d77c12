"""Tokenizers: text and chat messages <-> ids, and whether two models speak the same ids."""

from collections.abc import Iterable, Sequence
import functools
import json
import pathlib
import re
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")

# The private-use planes, from which `encode_chat` takes its place holders.
PRIVATE = 0xF0000

# Strings on which tokenizers of different models part ways: numbers, space, case, scripts.
PROBES = (
    "The quick brown fox jumps over the lazy dog.", "12345 + 67890 = 80235", "3.14159, 1e-5, 1,000",
    "  two  spaces\tand a tab\n\nand lines\r\n", "def f(x):\n    return x**2  # squared",
    "naïve café — “quoted” … €5", "北京大学 数学 题", "Привет мир", "مرحبا", "🙂👩‍👩‍👧", "\\frac{1}{2} \\boxed{x_1}",
    "<|im_start|>user<|im_end|></s><s>[INST]<think>", "#### 42\n",
)


class Tokenizer:
  """A transformers fast tokenizer with the few verbs this project needs.

  Control tokens enter only through the chat template: their spelling inside text, data or
  a model's answer is encoded as ordinary characters.
  """

  def __init__(self, hf: Any, eos_ids: Iterable[int], name: str):
    self.hf = hf
    self.name = name
    self.eos_ids = tuple(sorted(set(eos_ids)))
    self.pad_id = hf.pad_token_id if hf.pad_token_id is not None else self.eos_ids[0]
    # Place holders that the text itself contains are hidden like control tokens.
    self._control = re.compile("|".join([
        *(re.escape(t) for t in sorted(hf.get_added_vocab(), key=len, reverse=True)),
        f"[{chr(PRIVATE)}-{chr(0x10FFFF)}]"]))

  @property
  def vocab_size(self) -> int:
    """Ids in use, added tokens included; a model's embedding may be padded beyond it."""
    return len(self.hf)

  def encode(self, text: str) -> list[int]:
    """Text -> ids, without BOS; control tokens in it are text."""
    return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

  def decode(self, ids: Sequence[int]) -> str:
    """Ids -> text, special tokens left out."""
    return self.hf.decode(ids, skip_special_tokens=True)

  def encode_chat(self, messages: list[dict[str, str]],
                  add_generation_prompt: bool = True) -> list[int]:
    """Chat messages -> ids through the model's own template.

    A control token spelled inside a message is swapped for a private-use character while
    the template is rendered and encoded as plain text afterwards. All else is exactly
    transformers' `apply_chat_template`.

    Raises: ValueError if the tokenizer has no chat template.
    """
    if not self.hf.chat_template:
      raise ValueError(f"the tokenizer in {self.name} has no chat template; name one in the "
                       "config's `chat_template` (Jinja text, or a file that holds it)")
    spelled: list[str] = []

    def hide(match):
      spelled.append(match.group())
      return chr(PRIVATE + len(spelled) - 1)

    hidden = [{**m, "content": self._control.sub(hide, m["content"])} for m in messages]
    text = self.hf.apply_chat_template(hidden, tokenize=False,
                                       add_generation_prompt=add_generation_prompt)
    template = functools.partial(self.hf.encode, add_special_tokens=False)
    if not spelled:
      return template(text)
    ids = []
    for piece in re.split(f"([{chr(PRIVATE)}-{chr(PRIVATE + len(spelled) - 1)}])", text):
      is_hidden = len(piece) == 1 and 0 <= ord(piece) - PRIVATE < len(spelled)
      ids += self.encode(spelled[ord(piece) - PRIVATE]) if is_hidden else template(piece)
    return ids

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes tokenizer.json and its companions into a Hugging Face folder."""
    self.hf.save_pretrained(str(folder))


def load(folder: str | pathlib.Path, chat_template: str = "") -> Tokenizer:
  """Loads the tokenizer of a local Hugging Face folder.

  Args:
    folder: holds tokenizer.json, and config.json / generation_config.json if there are any.
    chat_template: Jinja text, or the path of a file with it, instead of the folder's own.
  Raises: ValueError if the folder or its tokenizer.json is missing.
  """
  from transformers import AutoTokenizer  # three seconds to import: only when needed
  folder = pathlib.Path(folder)
  if not (folder / "tokenizer.json").is_file():
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise ValueError(f"no tokenizer.json in {folder} (found: {found}); name a Hugging Face folder "
                     "with a fast tokenizer")
  hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
  if chat_template:
    path = pathlib.Path(chat_template)
    hf.chat_template = path.read_text() if "{" not in chat_template else chat_template
  eos = {hf.eos_token_id} - {None}
  for name in ("config.json", "generation_config.json"):
    if (folder / name).is_file():
      ids = json.loads((folder / name).read_text()).get("eos_token_id")
      eos |= set(ids) if isinstance(ids, list) else {ids} - {None}
  if not eos:
    raise ValueError(f"nothing in {folder} says which token ends a response: tokenizer_config.json "
                     "or generation_config.json needs an eos token")
  return Tokenizer(hf, eos, str(folder))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """A byte-level BPE of our own, for the tiny models and for tests. Deterministic.

  Digits and symbols stay single tokens, so arithmetic is read digit by digit; only letters
  merge. All 256 bytes are there, so any text can be encoded.

  Args:
    texts: what the merges are learnt from; none are needed for a pure byte tokenizer.
    vocab_size: including the 256 bytes and the 3 special tokens.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.Sequence([
      # A word with the space before it, or any single other character.
      pre_tokenizers.Split(tokenizers.Regex(r" ?[A-Za-z]+|####|[\s\S]"), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  bpe.decoder = decoders.ByteLevel()
  bpe.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
  hf = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=SPECIAL[0], eos_token=SPECIAL[2],
                               additional_special_tokens=[SPECIAL[1]])
  hf.chat_template = CHATML
  return Tokenizer(hf, [hf.eos_token_id], "a tokenizer trained in this run")


def byte_tokenizer() -> Tokenizer:
  """One token a byte: 259 ids."""
  return train_bpe((), 259)


def check_same(student: Tokenizer, teacher: Tokenizer) -> list[str]:
  """Makes sure that the same ids mean the same text, by encoding probe strings.

  Returns: notices: what differs and is handled (sizes), or deserves a look (end tokens).
  Raises: ValueError naming the first probe that the two encode differently.
  """
  for probe in PROBES:
    ours, theirs = student.encode(probe), teacher.encode(probe)
    if ours != theirs:
      raise ValueError(
          "teacher and student tokenizers differ, so their log-probabilities cannot be compared: "
          f"{probe!r} is {ours} for the student ({student.name}) and {theirs} for the teacher "
          f"({teacher.name}). Choose a teacher of the student's family.")
  notices = []
  if student.vocab_size != teacher.vocab_size:
    notices.append(f"vocabularies are {student.vocab_size} (student) and {teacher.vocab_size} "
                   "(teacher) long with the same encodings: the shared ids are compared")
  if student.eos_ids != teacher.eos_ids:
    notices.append(
        f"warning: responses end with {student.eos_ids} for the student and {teacher.eos_ids} for "
        "the teacher; a student taught by a teacher that never ends as it does grows longer and "
        "longer. A short SFT on the teacher's format first helps.")
  return notices
