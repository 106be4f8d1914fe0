"""Tests on several MPI ranks: a pytest plugin, and real commands under mpirun.

- `plugin`: what pytest loads: the mark `ranks`, the fixture `comm`, and the controller, which
  starts one launch per number of ranks and reports for all of them.
- `rank`: the plugin's part inside a launch: run each test together with the other ranks.
- `job`: the files through which ranks report, the time limits, and the merged reports.
- `warm`: ranks that are started once and run many commands; `warm_rank` is one of them.
- `launch`: mpirun itself: found, given its environment, ended for certain, cleaned up after.
"""

from mpi_runner.launch import Launch, run_mpi
from mpi_runner.warm import run_warm

__all__ = ["Launch", "run_mpi", "run_warm"]
