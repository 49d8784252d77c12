"""What a run would cost on a pod that is not here: compiles its functions for it, from shapes.

    python -m opd_jax.aot --config=configs/iw_opd.py:paper --topology=v5p:4x4x8

Nothing is read but the models' config.json; a model that is not here is known by its name. Any key
can be changed on the command line, as for opd_jax.main: --config.mesh.model=4
"""

import functools
import os
import re
import sys

topology = re.search(r"--?topology[= ]cpu:(\d+)", " ".join(sys.argv))
os.environ["JAX_PLATFORMS"] = "cpu"  # of this process; what it compiles for is in --topology
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks the network what machine this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used, so none is to be locked
if topology:  # before JAX is imported
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                             + f" --xla_force_host_platform_device_count={topology[1]}")

from absl import app, flags, logging  # pylint: disable=wrong-import-position

from opd_jax import compilations, progress  # pylint: disable=wrong-import-position
from opd_jax import main as opd_main  # pylint: disable=wrong-import-position
from opd_jax.aot import study  # pylint: disable=wrong-import-position

USAGE = "python -m opd_jax.aot --config=configs/iw_opd.py:paper --topology=v5p:4x4x8"
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, v5p:4x4x8, cpu:8, ...")
SWEEP = flags.DEFINE_bool("sweep", False, "Also tries other meshes and remat policies.")
LARGEST = flags.DEFINE_bool("largest", False, "Also looks for the largest number of slots and "
                            "the largest micro-batch that fit.")
SCALING = flags.DEFINE_list("scaling", [], "Topologies of several sizes: how scoring and updates "
                            "of the same batch fall with the number of chips; nothing else.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; keys are set as --config.key=value")
  logging.set_verbosity(logging.ERROR)
  compilations.for_tpus()
  progress.console.stderr = True  # what goes to the standard output is the report
  try:
    fits = study.run(opd_main.CONFIG.value, TOPOLOGY.value, SWEEP.value, LARGEST.value,
                     SCALING.value)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  sys.exit(0 if fits else 1)


if __name__ == "__main__":
  app.run(main, flags_parser=functools.partial(opd_main.parse, usage=USAGE))
