"""Tokenizers: text and chat messages <-> ids, and whether two models speak the same ids."""

from collections.abc import Iterable, Sequence
import functools
import json
import os
import pathlib
import re
from typing import Any

import jinja2

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")

# We want its tokenizers and configs alone, and so no advice about a missing PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# The private-use planes, from which `encode_chat` takes its place holders.
PRIVATE = 0xF0000

# Strings on which tokenizers of different models part ways: numbers, space, case, scripts.
PROBES = (
    "The quick brown fox jumps over the lazy dog.", "12345 + 67890 = 80235", "3.14159, 1e-5, 1,000",
    "  two  spaces\tand a tab\n\nand lines\r\n", "def f(x):\n    return x**2  # squared",
    "naïve café — “quoted” … €5", "北京大学 数学 题", "Привет мир", "مرحبا", "🙂👩‍👩‍👧",
    "\\frac{1}{2} \\boxed{x_1}",
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
    # Added tokens that are not special ("<think>") are words, which templates may look for.
    control = [t.content for t in hf.added_tokens_decoder.values() if t.special]
    # Place holders that the text itself contains are hidden like control tokens.
    self._control = re.compile("|".join([
        *(re.escape(t) for t in sorted(control, key=len, reverse=True)),
        f"[{chr(PRIVATE)}-{chr(0x10FFFF)}]"]))

  @property
  def vocab_size(self) -> int:
    """Ids in use, added tokens included; a model's embedding may be padded beyond it."""
    return len(self.hf)

  @functools.cached_property
  def end_id(self) -> int:
    """The one of `eos_ids` with which a response to learn from ends.

    It is the one that the chat template puts behind an assistant's turn. Of several ids the
    others often end documents (Qwen, Llama 3, Phi), and a student must not learn those here.
    """
    if self.hf.chat_template:
      turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": chr(PRIVATE)}]
      tail = self._render(turns, add_generation_prompt=False).rpartition(chr(PRIVATE))[2]
      for i in self.hf.encode(tail, add_special_tokens=False):
        if i in self.eos_ids:
          return i
    return self.hf.eos_token_id if self.hf.eos_token_id in self.eos_ids else self.eos_ids[0]

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

    Raises: ValueError if the tokenizer has no chat template, or one that refuses the messages.
    """
    spelled: list[str] = []

    def hide(match):
      spelled.append(match.group())
      return chr(PRIVATE + len(spelled) - 1)

    hidden = [{**m, "content": self._control.sub(hide, m["content"])} for m in messages]
    text = self._render(hidden, add_generation_prompt)
    template = functools.partial(self.hf.encode, add_special_tokens=False)
    if not spelled:
      return template(text)
    ids = []
    for piece in re.split(f"([{chr(PRIVATE)}-{chr(PRIVATE + len(spelled) - 1)}])", text):
      is_hidden = len(piece) == 1 and 0 <= ord(piece) - PRIVATE < len(spelled)
      ids += self.encode(spelled[ord(piece) - PRIVATE]) if is_hidden else template(piece)
    return ids

  def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    if not self.hf.chat_template:
      raise ValueError(f"the tokenizer in {self.name} has no chat template; name one in the "
                       "config's `chat_template` (Jinja text, or a file that holds it)")
    try:
      return self.hf.apply_chat_template(messages, tokenize=False,
                                         add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
      roles = ", ".join(m["role"] for m in messages)
      raise ValueError(f"the chat template of {self.name} failed on messages of the roles {roles}: "
                       f"{error}. Change the messages, or name another `chat_template`") from error

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes tokenizer.json and its companions into a Hugging Face folder."""
    self.hf.save_pretrained(str(folder))


def load(folder: str | pathlib.Path, chat_template: str = "") -> Tokenizer:
  """Loads the tokenizer of a local Hugging Face folder.

  Args:
    folder: holds tokenizer.json, and config.json / generation_config.json if there are any.
    chat_template: Jinja text, or the path of a file with it, instead of the folder's own.
  Raises: ValueError if the folder, its tokenizer.json or the template's file is missing or
    unreadable, or if nothing says which token ends a response.
  """
  from transformers import AutoTokenizer  # three seconds to import: only when needed
  folder = pathlib.Path(folder)
  if not (folder / "tokenizer.json").is_file():
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise ValueError(f"no tokenizer.json in {folder} (found: {found}); name a Hugging Face folder "
                     "with a fast tokenizer")
  # Read first: transformers' own errors do not say which of the files is broken.
  names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
  read = {name: _read_json(folder / name) for name in names if (folder / name).is_file()}
  hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
  if chat_template:
    hf.chat_template = _read_template(chat_template)
  eos = {hf.eos_token_id} - {None}
  for name in ("config.json", "generation_config.json"):
    ids = read.get(name, {}).get("eos_token_id")
    eos |= set(ids) if isinstance(ids, list) else {ids} - {None}
  if not eos:
    raise ValueError(f"nothing in {folder} says which token ends a response: tokenizer_config.json "
                     "or generation_config.json needs an eos token")
  return Tokenizer(hf, eos, str(folder))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); it may be cut off, copy it again") from error


def _read_template(named: str) -> str:
  if "{" in named:
    return named
  if not pathlib.Path(named).is_file():
    raise ValueError(f"chat_template is {named!r}: there is no such file, and it is no Jinja text "
                     "either, which would hold a '{'")
  return pathlib.Path(named).read_text(encoding="utf-8")


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
  Raises: ValueError naming the first probe that the two encode differently, or a control
    token that has another id for each.
  """
  for probe in PROBES:
    ours, theirs = student.encode(probe), teacher.encode(probe)
    if ours != theirs:
      raise ValueError(
          "teacher and student tokenizers differ, so their log-probabilities cannot be compared: "
          f"{probe!r} is {ours} for the student ({student.name}) and {theirs} for the teacher "
          f"({teacher.name}). Choose a teacher of the student's family.")
  # `encode` never makes control ids, so no probe can show these.
  ours, theirs = student.hf.get_added_vocab(), teacher.hf.get_added_vocab()
  for token in sorted(ours.keys() & theirs.keys()):
    if ours[token] != theirs[token]:
      raise ValueError(
          f"teacher and student tokenizers differ: the control token {token!r} is {ours[token]} "
          f"for the student ({student.name}) and {theirs[token]} for the teacher "
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
  turn = [{"role": "user", "content": "x"}]
  if (student.hf.chat_template and teacher.hf.chat_template and
      student.encode_chat(turn) != teacher.encode_chat(turn)):
    notices.append("warning: the chat templates differ; the teacher is asked in the student's "
                   f"({student.name}), which is not the one it was trained with")
  return notices
