"""What a self-teacher sees: a rollout's question, rebuilt from the other rollouts of its group.

    verified groups -> each rollout's peers -> conversation -> token ids -> blocks for a scorer

Text and numpy alone, on the host. Whose texts a rollout's teacher is shown is drawn from the run's
key and the rollout's place, so a resumed run draws the same, on any number of hosts.
"""

import bisect
from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
import numpy as np

from opd_jax.data import chat
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.rollouts import batch as batches

# Which of a rollout's successful and of its failed peers are shown, of each in its random order.
# So with one key all seven contexts of MOPD's analysis (METHODS 4) share their peers.
PEERS = {
    "plain": (slice(0), slice(0)),
    "success": (slice(1), slice(0)),                # SDPO
    "another_success": (slice(1, 2), slice(0)),
    "failure": (slice(0), slice(1)),
    "success_failure": (slice(1), slice(1)),
    "two_successes_failure": (slice(2), slice(1)),  # MOPD
    "all_successes": (slice(None), slice(0)),
}

FEEDBACK = ("never", "without_success", "always")


class Group(NamedTuple):
  """A prompt and its G verified rollouts."""

  number: int               # the prompt's place in its step, over all hosts
  messages: chat.Messages   # the plain conversation; its last turn is the question
  texts: Sequence[str]      # what was sampled
  rewards: Sequence[float]
  feedback: Sequence[str]   # what the verifier said of each


class Settings(NamedTuple):
  """The `context` section of a config."""

  budget: int                           # tokens, generation prompt included
  peers: str = "two_successes_failure"  # of PEERS
  control: str = ""                     # of CONTROLS, in the place of these peers; "": these
  match: str = "blocks"                 # of MATCHES: in what a control equals them
  feedback: str = "never"               # of FEEDBACK: when a failed rollout sees its own
  success_at: float = 1.0               # the least reward of a success
  remove_thinking: bool = False         # from the peers' texts


class Part(NamedTuple):
  """One section of a context."""

  kind: str    # "success", "failure" or "feedback": the heading that it stands under
  text: str    # as shown
  group: int   # number of the group of the rollout that it speaks of
  row: int     # place of this rollout in its group


class Context(NamedTuple):
  """What the self-teacher of one rollout sees."""

  messages: chat.Messages
  ids: list[int]            # ends with the generation prompt
  shown: tuple[Part, ...]   # (): nothing was gained, the conversation is the plain one
  dropped: tuple[Part, ...]  # what the budget had no room for
  same: int                 # peers left out because their text is the rollout's own


class Pools(NamedTuple):
  """Whom a rollout's context could show, in random orders."""

  peers: list[Part]   # of its group
  again: list[Part]   # the same in another order
  others: list[Part]  # of other prompts


def make(groups: Sequence[Group], settings: Settings, tokenizer: Tokenizer, key: jax.Array,
         summarize: Callable[[Sequence[str]], Sequence[str]] | None = None) -> list[Context]:
  """The context of every rollout's self-teacher, group after group.

  A rollout is never shown its own text, and so no peer that happened to write the same: the
  teacher would read off every token that it is asked about, and its word on them would speak of
  copying. A peer of which nothing is left to show (no text, or but a thought) is no peer either.
  A successful rollout is not shown its feedback, which has nothing to correct.

  Args:
    groups: the prompts of a batch, on several hosts each its own. Only the control "unrelated"
      looks from one to another, and so depends on who else is here.
    settings: what is shown, and in how many tokens.
    tokenizer: of the teacher. What models wrote is text to it, control tokens included.
    key: from `keys.at(root, "context", step)`.
    summarize: peers' texts -> what is shown in their place, one each. It is asked once, about
      all different texts of the batch.
  Returns: a context a rollout, over the budget only where nothing is left to drop.
  Raises: ValueError for unknown settings, or a group of uneven columns.
  Source: MOPD (2605.12652); with peers="success" SDPO.
  """
  check(settings)
  _even(groups)
  count = functools.cache(lambda text: len(tokenizer.encode(text)))
  seed = [int(word) for word in np.ravel(jax.random.key_data(key))]
  rollouts = _rollouts(groups, settings, summarize)
  write = functools.partial(_write, budget=settings.budget, tokenizer=tokenizer, count=count)
  near = functools.partial(MATCHES[settings.match], count=count)
  contexts = []
  for group, mine in zip(groups, rollouts):
    # Not of the same prompt either, which may be twice in a batch.
    strangers = [rollout for other, theirs in zip(groups, rollouts)
                 if other.messages != group.messages for rollout in theirs]
    for row, own in enumerate(mine):
      pool = functools.partial(_pool, own, seed=seed, place=(group.number, row))
      peers = pool(mine, draw=0)
      feedback = _feedback(settings, group, row, peers)
      context = write(group.messages, _chosen(settings.peers, peers) + feedback)
      if settings.control:
        pools = Pools(peers, again=pool(mine, draw=1), others=pool(strangers, draw=2))
        instead = CONTROLS[settings.control](context.shown, pools, near)
        context = write(group.messages, instead + _of("feedback", context.shown))
      same = sum(rollout.tells(own) for other, rollout in enumerate(mine) if other != row)
      contexts.append(context._replace(same=same))
  return contexts


def shuffled(items: Sequence, seed: Sequence[int], *place: int) -> list:
  """The items in an order that the seed and the place alone decide.

  The first of them stay in the same order among each other if others are appended.
  """
  # Not a Generator's permutation, which may change from one numpy to the next (NEP 19).
  draws = np.random.SeedSequence(seed, spawn_key=place).generate_state(len(items), np.uint64)
  return [items[i] for i in np.argsort(draws, kind="stable")]


class _Rollout(NamedTuple):
  words: str  # as sampled, but for white space
  part: Part  # what its peers are shown

  def tells(self, own: "_Rollout") -> bool:
    """Whether another rollout would read its own text in this one, or in what is shown of it."""
    return own.words in (self.words, " ".join(self.part.text.split()))


def _rollouts(groups: Sequence[Group], settings: Settings,
              summarize: Callable | None) -> list[list[_Rollout]]:
  clean = chat.without_thinking if settings.remove_thinking else str
  texts = [[clean(text) for text in group.texts] for group in groups]
  if summarize:
    asked = list(dict.fromkeys(text for row in texts for text in row if text.strip()))
    told = dict(zip(asked, summarize(asked), strict=True)) if asked else {}
    texts = [[told.get(text, "") for text in row] for row in texts]

  def one(sampled, reward, text, group, row):
    kind = "success" if reward >= settings.success_at else "failure"
    return _Rollout(" ".join(sampled.split()), Part(kind, text, group.number, row))

  return [[one(*columns, group, row) for row, columns
           in enumerate(zip(group.texts, group.rewards, shown))]
          for group, shown in zip(groups, texts)]


def _pool(own: _Rollout, candidates: Sequence[_Rollout], seed: Sequence[int],
          place: tuple[int, int], draw: int) -> list[Part]:
  """What a rollout's context may show of the candidates, in random order."""
  # All are shuffled, so that what one of them says does not move the others.
  return [rollout.part for rollout in shuffled(candidates, seed, *place, draw)
          if not rollout.tells(own) and rollout.part.text.strip()]


def _of(kind: str, parts: Sequence[Part]) -> list[Part]:
  return [part for part in parts if part.kind == kind]


def _chosen(peers: str, pool: list[Part]) -> list[Part]:
  successes, failures = PEERS[peers]
  return _of("success", pool)[successes] + _of("failure", pool)[failures]


def _feedback(settings: Settings, group: Group, row: int, peers: list[Part]) -> list[Part]:
  text, failed = group.feedback[row], group.rewards[row] < settings.success_at
  allowed = settings.feedback == "always" or (
      settings.feedback == "without_success" and not _of("success", peers))
  if not (allowed and failed and text.strip()):
    return []
  return [Part("feedback", text, group.number, row)]


def _write(messages: chat.Messages, parts: Sequence[Part], budget: int, tokenizer: Tokenizer,
           count: Callable[[str], int]) -> Context:
  """The conversation with as many of the parts as the budget allows; the longest go first."""
  def keep(places):
    shown = tuple(part for i, part in enumerate(parts) if i in places)
    dropped = tuple(part for i, part in enumerate(parts) if i not in places)
    successes, failures, feedback = (
        [part.text for part in _of(kind, shown)] for kind in ("success", "failure", "feedback"))
    told = chat.with_peers(messages, successes, failures, "\n".join(feedback))
    return Context(told, tokenizer.encode_chat(told), shown, dropped, 0)

  whole = keep(range(len(parts)))
  if not parts or len(whole.ids) <= budget:
    return whole
  # Of equals the first goes first: it is a success, of which there may be another.
  by_length = sorted(reversed(range(len(parts))), key=lambda i: count(parts[i].text))
  shortest = functools.cache(lambda number: keep(by_length[:number]))
  # A search, since encoding is what costs.
  return shortest(bisect.bisect_left(range(1, len(parts)), True,
                                     key=lambda number: len(shortest(number).ids) > budget))


def by_blocks(pool: list[Part], wanted: list[Part], count: Callable[[str], int]) -> list[Part]:
  """The first of the pool, as many as are wanted."""
  return pool[:len(wanted)]


def by_tokens(pool: list[Part], wanted: list[Part], count: Callable[[str], int]) -> list[Part]:
  """Of the pool, in its order, each peer that brings the sum of tokens nearer to that wanted.

  Headings count. At least one is taken, if one is wanted. A search for the nearest sum would be
  no control: of the same group it would find the very peers that it is to differ from.
  """
  headings = {"success": chat.ANOTHER_SUCCESS, "failure": chat.FAILURE}
  size = lambda part: count(f"{headings[part.kind]}\n{part.text}\n\n")
  gap, chosen = sum(map(size, wanted)), []
  for part in pool:
    if abs(gap - size(part)) < abs(gap):
      gap -= size(part)
      chosen.append(part)
  return chosen if chosen or not wanted else sorted(pool, key=size)[:1]


Near = Callable[[list[Part], list[Part]], list[Part]]  # (pool, wanted) -> as much of the pool


def random_peers(shown: Sequence[Part], pools: Pools, near: Near) -> list[Part]:
  """Under the same headings, peers whatever their verdict."""
  under = lambda kind, pool: [part._replace(kind=kind) for part in pool]
  successes = near(under("success", pools.again), _of("success", shown))
  taken = {part.row for part in successes}
  left = [part for part in pools.again if part.row not in taken]
  return successes + near(under("failure", left), _of("failure", shown))


def unrelated(shown: Sequence[Part], pools: Pools, near: Near) -> list[Part]:
  """Under the same headings, other prompts' successes and failures."""
  return [part for kind in ("success", "failure")
          for part in near(_of(kind, pools.others), _of(kind, shown))]


def successes_only(shown: Sequence[Part], pools: Pools, near: Near) -> list[Part]:
  """The same successes, and further ones in the place of the failure."""
  same = _of("success", shown)
  further = [part for part in _of("success", pools.peers) if part not in same]
  return near(same + further, same + _of("failure", shown))


MATCHES = {"blocks": by_blocks, "tokens": by_tokens}
CONTROLS = {"random": random_peers, "unrelated": unrelated, "successes": successes_only}


def check(settings: Settings) -> None:
  """Refuses names that do not exist, or say nothing. Raises: ValueError naming the key."""
  for name, known in (("peers", PEERS), ("control", ("", *CONTROLS)), ("match", MATCHES),
                      ("feedback", FEEDBACK)):
    if getattr(settings, name) not in known:
      raise ValueError(f"context.{name} is {getattr(settings, name)!r}; it must be one of "
                       + ", ".join(map(repr, known)))
  if settings.match != Settings(0).match and not settings.control:
    raise ValueError(f"context.match is {settings.match!r}, and context.control '': there is no "
                     f"control to match; set one of {', '.join(CONTROLS)}, or leave match as it is")


def _even(groups: Sequence[Group]) -> None:
  for group in groups:
    sizes = [len(column) for column in (group.texts, group.rewards, group.feedback)]
    if len(set(sizes)) > 1:
      raise ValueError(f"group {group.number} has {sizes[0]} texts, {sizes[1]} rewards and "
                       f"{sizes[2]} strings of feedback; each rollout needs one of each")


def gained(contexts: Sequence[Context]) -> np.ndarray:
  """bool[N]: which rollouts were shown anything. The others carry no loss."""
  return np.array([bool(context.shown) for context in contexts], bool)


def metrics(contexts: Sequence[Context]) -> dict[str, float]:
  """Means over all rollouts of a step."""
  mean = lambda values: float(np.mean([*values] or [0.0]))
  return {
      "context/without": mean(~gained(contexts)),       # share that carries no loss
      "context/length": mean(len(c.ids) for c in contexts),
      "context/parts": mean(len(c.shown) for c in contexts),
      "context/dropped": mean(len(c.dropped) for c in contexts),  # parts
      "context/over_budget": mean(bool(c.dropped) for c in contexts),  # share that lost some
      "context/same_text": mean(c.same > 0 for c in contexts),    # share with such peers
  }


class Block(NamedTuple):
  """n rows to be scored in one call; n follows from S alone, so shapes are few."""

  row: np.ndarray          # i32[n], which of the N contexts; N where a row only fills the block
  prompt: np.ndarray       # i32[n, S], left-padded
  prompt_mask: np.ndarray  # bool[n, S]


def pack(contexts: Sequence[Context], rows: Sequence[int], buckets: Sequence[int],
         size: Callable[[int], int], pad_id: int) -> list[Block]:
  """Contexts in blocks of like length, so that a long one pads but few others.

  Rows go from the longest to the shortest, and each block takes the bucket of its first row. A
  row that only fills a block repeats another, so that nothing in it is undefined; put results
  back with `.at[block.row].set(..., mode="drop")`. How many blocks there are depends on the
  lengths: hosts that score together must agree on it first.

  Args:
    contexts: N of them.
    rows: of [0, N), those to be scored: all, or those that gained something.
    buckets: the widths S.
    size: n of a width, a multiple of the devices that rows are cut over.
    pad_id: what prompts are filled with.
  Raises: ValueError if a row is longer than all buckets.
  """
  rows = sorted(rows, key=lambda i: -len(contexts[i].ids))
  blocks = []
  while rows:
    width = batches.bucket(len(contexts[rows[0]].ids), buckets)
    n = size(width)
    here, rows = rows[:n], rows[n:]
    fill = n - len(here)
    ids = [contexts[i].ids for i in here + here[-1:] * fill]
    blocks.append(Block(np.array(here + [len(contexts)] * fill, np.int32),
                        *batches.pad(ids, width, pad_id, left=True)))
  return blocks


def block_rows(tokens: int, width: int, response: int, multiple: int) -> int:
  """The rows n of a block of at most `tokens` padded tokens.

  Args:
    tokens: of which it may have n (width + response); it has at least `multiple` rows anyway.
    width: that its contexts are padded to.
    response: columns that the scorer adds to each row.
    multiple: of which n must be one, the devices that rows are cut over.
  """
  return max(tokens // (multiple * (width + response)), 1) * multiple


def packing(blocks: Sequence[Block], contexts: Sequence[Context], responses: Sequence[int],
            columns: int) -> dict[str, float]:
  """Columns that a scorer computes, and those that are needed.

  What is not needed are the columns that pad a context or a response, and rows that only fill a
  block.

  Args:
    responses: [N], tokens of each context's response.
    columns: that all responses are padded to.
  """
  real = [i for block in blocks for i in block.row.tolist() if i < len(contexts)]
  return {"context/tokens_computed": float(sum(
              block.prompt.size + columns * len(block.row) for block in blocks)),
          "context/tokens_needed": float(sum(len(contexts[i].ids) + responses[i] for i in real))}
