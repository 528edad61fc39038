"""Let the server of loader workers outlast stop signals, which a terminal or Slurm sends to a rank's whole group.

Only the server imports this module, before the modules that take a second to load. The rank blocks the signals while it
starts the server (data/loading/loader.py), so that none can end it before.
"""

import signal

blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
for number in blocked:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
