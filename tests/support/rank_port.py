"""Where ranks that a test starts without a launcher meet."""

import random
import socket

# Below those that Linux gives to whoever asks for any (ip_local_port_range), so that no one comes in between.
PORTS = range(20000, 32768)


def find_rank_port() -> int:
    """A TCP port that is free now, and that nobody gets by chance before the ranks open it."""
    while True:
        port = random.SystemRandom().choice(PORTS)  # other test processes choose too, from the same seed perhaps
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
