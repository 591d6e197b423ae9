"""What tests share, importable as `support`: runs, folders, processes, command lines, and a Hub."""

import os

# Before torch is imported: the suite runs on as many workers as there are cores, and a pool of
# threads does not survive the forks of the crash suites. It also fixes the order of every sum.
os.environ["OMP_NUM_THREADS"] = "1"
