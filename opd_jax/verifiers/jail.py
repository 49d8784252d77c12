"""The inside of the sandbox: a fresh interpreter that shuts itself in and runs a program there.

sandbox.py runs this file as a script, with the standard library and an empty environment, and
writes a job to its standard input. Three processes follow each other down:

    jailer    enters its own namespaces, gives up every right, and keeps the time limit
    first     process 1 of those namespaces: when it ends, the kernel ends all the others
    program   one for each standard input; under limits and a filter of system calls

Nothing that the program could want stands in any of them: no answer, no key, no file of the
user. What the program writes goes to files in memory, which the jailer reads when all is over.
Only Linux on x86-64 and ARM64 can do this.
"""

import atexit
import builtins
import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import sys
import threading
import traceback
import types

NOBODY = 65534
# Mounted over and then made the root; nothing else here needs it.
ROOT = "/sys"
# What a Python needs beside its own library: the C library and its loader.
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# linux/sched.h, linux/mount.h, linux/prctl.h
NEW_USER, NEW_MOUNT, NEW_PID, NEW_NET, NEW_IPC = 1 << 28, 1 << 17, 1 << 29, 1 << 30, 1 << 27
THREAD = 1 << 16
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18)
DETACH = 2
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 4, 22, 38

# System calls that no solution of an exercise needs: other processes and programs, sockets,
# memory that no limit counts, other namespaces, and the kernel's less trodden corners. The
# numbers on each machine; None where it does not exist.
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = (56, 220)
CLONE3 = (435, 435)
REFUSED = dict(
    fork=(57, None), vfork=(58, None), execve=(59, 221), execveat=(322, 281),
    socket=(41, 198), memfd_create=(319, 279), shmget=(29, 194), msgget=(68, 186), semget=(64, 190),
    ptrace=(101, 117), process_vm_readv=(310, 270), process_vm_writev=(311, 271),
    unshare=(272, 97), setns=(308, 268), mount=(165, 40), umount2=(166, 39),
    pivot_root=(155, 41), chroot=(161, 51), open_by_handle_at=(304, 265), bpf=(321, 280),
    perf_event_open=(298, 241), add_key=(248, 217), request_key=(249, 218), keyctl=(250, 219),
    userfaultfd=(323, 282), io_uring_setup=(425, 425))


class Impossible(Exception):
  """What this machine does not give, in words."""


def main() -> None:
  """Runs the job on standard input; writes to standard output what came of it, as JSON.

  The job: source (Python), stdins (list of str), isolated, and the fields of sandbox.Limits.
  The answer: {"missing": words}, or {"ended": [[status, stdout, stderr], ...]}, one for each
  input that was reached, the last with status null if time ran out meanwhile.
  """
  parent = int(sys.argv[1])
  follow(parent)
  job = json.load(sys.stdin.buffer)
  try:
    if job["isolated"]:
      shut_in(job["output_bytes"])
      follow(parent)  # giving up rights has revoked it
  except (Impossible, OSError, ImportError, AttributeError) as error:
    answer(missing=str(error))
    return
  ended, stdout, leash = os.memfd_create("ended"), os.memfd_create("stdout"), os.pipe()
  first = os.fork()
  if first == 0:
    os.close(leash[1])
    control(SET_DEATH_SIGNAL, signal.SIGKILL)
    if not select.select([leash[0]], [], [], 0)[0]:  # the jailer has not died meanwhile
      serve(job, ended, stdout)
    os._exit(0)
  out_of_time = not select.select([os.pidfd_open(first)], [], [], job["wall_s"])[0]
  with contextlib.suppress(ProcessLookupError):
    if not job["isolated"]:
      os.killpg(first, signal.SIGKILL)  # the program too, which no namespace ends
  os.kill(first, signal.SIGKILL)  # a process not yet waited for can always be sent a signal
  os.waitpid(first, 0)  # of a namespace's process 1: returns when all the others are gone
  # What follows the last line break was cut off by the end.
  results = [json.loads(line) for line in contents(ended).split(b"\n")[:-1]]
  if out_of_time:
    results.append([None, contents(stdout).decode("utf-8", "replace"), ""])
  answer(ended=results)


def answer(**fields) -> None:
  sys.stdout.write(json.dumps(fields))
  sys.stdout.flush()


def follow(parent: int) -> None:
  """Dies with the parent; at once if it is gone already."""
  control(SET_DEATH_SIGNAL, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(1)


# ------------------------------------------------------------------ namespaces, files, rights


def shut_in(scratch_bytes: int) -> None:
  """Leaves the machine's processes, network and files for ever; keeps no right over anything.

  Raises: Impossible naming the step that this machine refuses.
  """
  if platform.machine() not in MACHINES:
    raise Impossible(f"no filter of system calls is known for {platform.machine()!r}")
  enter_namespaces()
  try:
    change_root(scratch_bytes)
  except OSError as error:
    raise Impossible(f"own files (mounting in a mount namespace): {error}") from error
  try:
    give_up_rights()
  except OSError as error:
    raise Impossible(f"giving up rights: {error}") from error


def enter_namespaces() -> None:
  user, group = os.getuid(), os.getgid()
  if user == 0:
    with contextlib.suppress(PermissionError):  # a root of a container only may have to keep them
      os.setgroups([])
  ready = os.pipe()
  mapper = os.fork()
  if mapper == 0:  # outside the new namespace, where alone the right to map users is
    os.close(ready[1])
    os._exit(0 if os.read(ready[0], 1) and map_users(os.getppid(), user, group) else 1)
  os.close(ready[0])
  try:
    for flag, name in ((NEW_USER, "user"), (NEW_MOUNT, "mount"), (NEW_PID, "process"),
                       (NEW_NET, "network"), (NEW_IPC, "ipc")):
      try:
        call("unshare", flag)
      except OSError as error:
        raise Impossible(f"a {name} namespace: {error}") from error
    os.write(ready[1], b"1")
  finally:
    os.close(ready[1])
    status = os.waitpid(mapper, 0)[1]
  if status:
    raise Impossible("a user namespace: its users cannot be mapped")


def map_users(pid: int, user: int, group: int) -> bool:
  """Makes the process nobody in its namespace, and, if it may be, outside of it too.

  Root becomes another user, since the kernel limits no number of processes of root's.
  """
  write = lambda name, text: os.write(os.open(f"/proc/{pid}/{name}", os.O_WRONLY), text.encode())
  one = lambda outside: f"{NOBODY} {outside} 1\n"
  two = f"0 0 1\n{one(NOBODY)}"
  try:
    write("setgroups", "deny")
    for name, outside in (("uid_map", user), ("gid_map", group)):
      try:
        write(name, two if user == 0 else one(outside))
      except OSError:  # a root that is one only inside a container
        write(name, one(outside))
    return True
  except OSError:
    return False


def change_root(scratch_bytes: int) -> None:
  """A root of Python's library, the C library, four devices, and an empty /tmp."""
  mount(None, "/", None, RECURSIVE | PRIVATE)
  mount("tmpfs", ROOT, "tmpfs", NO_SUID | NO_DEV, "size=1m,nr_inodes=4k,mode=755")
  library = os.path.join(os.path.realpath(sys.base_prefix), "lib")
  shown = []
  for path in (*LIBRARIES, library, *DEVICES):
    if os.path.lexists(path) and not any(path.startswith(f"{x}/") for x in shown):
      show(path)
      shown.append(path)
  os.mkdir(f"{ROOT}/tmp")
  mount("tmpfs", f"{ROOT}/tmp", "tmpfs", NO_SUID | NO_DEV,
        f"size={scratch_bytes},nr_inodes=4k,mode=1777")
  os.chdir(ROOT)
  call("pivot_root", b".", b".")
  call("umount2", b".", DETACH)  # the old root, which lies over the new one
  mount(None, "/", None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV)
  os.chdir("/tmp")


def show(path: str) -> None:
  """Shows a file or folder of the machine at the same place in the new root, to be read."""
  target = ROOT + path
  os.makedirs(os.path.dirname(target), exist_ok=True)
  if os.path.islink(path):
    os.symlink(os.readlink(path), target)
    return
  if os.path.isdir(path):
    os.makedirs(target, exist_ok=True)
  else:
    os.close(os.open(target, os.O_CREAT))
  mount(path, target, None, BIND | RECURSIVE)
  if path not in DEVICES:
    kept = os.statvfs(path).f_flag & NO_EXEC  # what the machine forbids stays forbidden
    mount(None, target, None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV | kept)


def give_up_rights() -> None:
  os.setresgid(NOBODY, NOBODY, NOBODY)
  os.setresuid(NOBODY, NOBODY, NOBODY)
  version_3, every = 0x20080522, ctypes.c_uint32 * 2
  call("capset", ctypes.byref(every(version_3, 0)), ctypes.byref((ctypes.c_uint32 * 6)()))
  control(SET_NO_NEW_PRIVILEGES, 1)
  control(SET_DUMPABLE, 0)  # closes its memory to the program, which is the same user


# ------------------------------------------------------------------------------- the program


def serve(job: dict, ended: int, stdout: int) -> None:
  """Life of the first process: one program after the other, until one fails."""
  if not job["isolated"]:
    os.setpgid(0, 0)
  left = job["output_bytes"]
  for stdin in job["stdins"]:
    files = [os.memfd_create("stdin"), stdout, os.memfd_create("stderr")]
    os.write(files[0], stdin.encode("utf-8", "surrogatepass"))
    os.truncate(stdout, 0)
    for file in files:
      os.lseek(file, 0, os.SEEK_SET)
    program = os.fork()
    if program == 0:
      become(job, files)
    status = None
    while status is None:  # whatever else was left behind is adopted, and reaped, here
      pid, how = os.wait()
      status = os.waitstatus_to_exitcode(how) if pid == program else None
    out, err = (contents(file) for file in files[1:])
    left -= len(out)
    os.close(files[0])
    os.close(files[2])
    text = out.decode("utf-8", "replace")
    line = json.dumps([status, text, err[-2000:].decode("utf-8", "replace")])
    os.write(ended, line.encode() + b"\n")
    if status != 0 or left < 0:
      break


def become(job: dict, files: list) -> None:
  """Turns this process into the program, and ends it. Does not return."""
  status = 1
  try:
    for number, file in enumerate(files):
      os.dup2(file, number)
    os.closerange(3, 1 << 16)
    for stream, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
      setattr(sys, stream, open(number, mode, encoding="utf-8", errors="surrogateescape",
                                closefd=False))
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, signal.SIG_DFL)  # a verifier's worker ignores them
    builtins.exit = builtins.quit = sys.exit  # which only interactive interpreters define
    sys.argv[:] = ["solution.py"]
    sys.path.append("/tmp")
    limit(job)
    try:
      refuse_system_calls()
    except (OSError, AttributeError):
      if job["isolated"]:
        raise
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    status = execute(job["source"], module)
  finally:
    os._exit(status)


def execute(source: str, module: types.ModuleType) -> int:
  """Runs the source as the main module. Returns: the exit status Python would give."""
  status = 0
  try:
    try:
      exec(compile(source, "solution.py", "exec"), module.__dict__)
    except SystemExit as error:
      status = error.code if isinstance(error.code, int) else int(error.code is not None)
    for thread in threading.enumerate():
      if not thread.daemon and thread is not threading.current_thread():
        thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
  except BaseException as error:
    status = 1
    traceback.print_exception(error, limit=-3)
  sys.stderr.flush()
  return status & 255


def limit(job: dict) -> None:
  limits = dict(CORE=0, AS=job["memory_bytes"], FSIZE=job["output_bytes"], NOFILE=64, MEMLOCK=0,
                MSGQUEUE=0)
  if job["isolated"]:  # elsewhere it would count every process of the user
    limits["NPROC"] = job["tasks"]
  for name, most in limits.items():
    what = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))
  # A signal that names the reason, and a second later one that cannot be ignored.
  resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_s"], job["cpu_s"] + 1))


def refuse_system_calls() -> None:
  """From here on `REFUSED` fail with EPERM, and of new tasks only threads are allowed."""
  if platform.machine() not in MACHINES:
    raise OSError(f"the numbers of system calls are unknown on {platform.machine()}")
  column = list(MACHINES).index(platform.machine())
  load = lambda offset: (0x20, 0, 0, offset)
  unless = lambda code, value: (code, 0, 1, value)  # skips the next instruction unless it holds
  equal, at_least, has = 0x15, 0x35, 0x45
  end = lambda action: (0x06, 0, 0, action)
  fail = lambda number: end(0x00050000 | number)
  allow, kill_process = end(0x7FFF0000), end(0x80000000)
  program = [load(4), (equal, 1, 0, list(MACHINES.values())[column]), kill_process, load(0)]
  if column == 0:
    program += [unless(at_least, 1 << 30), fail(errno.EPERM)]  # the x32 calls, under other names
  for numbers in REFUSED.values():
    if numbers[column] is not None:
      program += [unless(equal, numbers[column]), fail(errno.EPERM)]
  # Flags of clone3 lie in memory, where a filter cannot read: libraries then try clone.
  program += [unless(equal, CLONE3[column]), fail(errno.ENOSYS)]
  program += [(equal, 1, 0, CLONE[column]), allow, load(16), unless(has, THREAD), allow,
              fail(errno.EPERM)]

  class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8),
                ("k", ctypes.c_uint32)]

  class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(Instruction))]

  instructions = (Instruction * len(program))(*(Instruction(*x) for x in program))
  control(SET_NO_NEW_PRIVILEGES, 1)
  control(SET_SECCOMP, 2, ctypes.byref(Program(len(program), instructions)))


def contents(file: int) -> bytes:
  return os.pread(file, os.fstat(file).st_size, 0)


# -------------------------------------------------------------------------------- the kernel


def call(name: str, *arguments) -> None:
  """A function of the C library that returns 0. Raises: OSError."""
  if getattr(LIBC, name)(*arguments) != 0:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def control(option: int, *arguments) -> None:
  filled = [x if not isinstance(x, int) else ctypes.c_ulong(x) for x in arguments]
  call("prctl", option, *filled, *[ctypes.c_ulong(0)] * (4 - len(filled)))


def mount(source, target, kind, flags, options=None) -> None:
  text = lambda x: None if x is None else os.fsencode(x)
  call("mount", text(source), text(target), text(kind), ctypes.c_ulong(flags), text(options))


LIBC = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
  main()
